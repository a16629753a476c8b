"""Tiny random-weight models and a byte tokenizer, saved as ordinary Hugging Face directories.

Every model has `N_LAYERS` decoder layers and untrained but *loud* weights: biases and norms
are random too, so a skipped module, a wrong layer or a wrong position changes the logits.

A token is a byte, so prompts are long and a generation header alone is 13 tokens: in the Gemma
families layers 0 and 1 see at most 8 tokens back, and at p_last *all prompts look alike there*
(every KL is ~0). Use layers 2 to 4 where an edit has to matter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

if TYPE_CHECKING:
    from persona_nnsight import Model

TinyDir = Callable[..., Path]
"""The fixture `tiny_dir`: a directory of a tiny model."""
Tiny = Callable[..., "Model"]
"""The fixture `tiny`: the same, loaded."""

N_LAYERS = 5
SLIDING_WINDOW = 8  # Gemma families, every other layer; layer 0 slides, as in the real ones
MISTRAL_WINDOW = 24  # every layer slides: with 8, no layer's p_last would reach back to the persona
GPT_NEO_WINDOW = 30
LONGROPE_FROM = 85  # tokens; the prompts of the tests' grid are shorter and longer
SEED = 20260523

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<pad>"
IM_START_ID, IM_END_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 259
EARLY_EOS_IDS = [IM_END_ID, *range(0, 256, 5)]
"""The end-of-sequence ids of an `eos_early` model: about one token in five ends it."""

_ALTERNATING = ["sliding_attention", "full_attention"]

# --------------------------------------------------------------------------------- templates

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A plain user turn."""

CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful tiny model.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
"""Adds a system message of its own when none is given, as SmolLM2's does."""

NO_SYSTEM = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Carries its own BOS and refuses a system role, as Gemma-2's does; the marks are plain text."""

THINKING = (
    CHATML
    + "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
"""Thinks unless told not to: `enable_thinking=False` adds an empty think block (Qwen3)."""

DATED = (
    "{% set day = strftime_now('%d %B %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{{ '<|im_start|>system\nToday Date: ' + day + '<|im_end|>\n' }}" + CHATML
)
"""Writes today's date, as Llama 3.2's does."""

# --------------------------------------------------------------------------------- tokenizer


def save_tokenizer(directory: Path, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Save a byte-level tokenizer: one token per UTF-8 byte, plus three special tokens.

    Its post-processor adds a BOS, so encoding a rendered template without
    `add_special_tokens=False` gives one token too many.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in (IM_START, IM_END, PAD)])
    core.post_processor = processors.TemplateProcessing(
        single=f"{IM_START} $A", pair=None, special_tokens=[(IM_START, IM_START_ID)]
    )
    assert core.get_vocab_size() == VOCAB_SIZE
    make: Any = PreTrainedTokenizerFast  # untyped
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=core,
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(directory))
    return tokenizer


# ------------------------------------------------------------------------------------ models

_IDS: dict[str, Any] = {
    "bos_token_id": IM_START_ID,
    "eos_token_id": IM_END_ID,
    "pad_token_id": PAD_ID,
}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    **_IDS,
}


def _build(model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    return cast(PreTrainedModel, model_class(config))


def _alternating(n: int) -> list[str]:
    return [_ALTERNATING[i % 2] for i in range(n)]


def _gemma3_text_config() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        **_TEXT,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=SLIDING_WINDOW,
        layer_types=_alternating(N_LAYERS),
    )


def _llama() -> PreTrainedModel:
    return _build(LlamaForCausalLM, LlamaConfig(**_TEXT, tie_word_embeddings=False))


def _qwen2() -> PreTrainedModel:
    return _build(Qwen2ForCausalLM, Qwen2Config(**_TEXT, tie_word_embeddings=True))


def _qwen3() -> PreTrainedModel:
    return _build(Qwen3ForCausalLM, Qwen3Config(**_TEXT, head_dim=16, tie_word_embeddings=False))


def _gemma2() -> PreTrainedModel:
    return _build(
        Gemma2ForCausalLM,
        Gemma2Config(
            **_TEXT,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=SLIDING_WINDOW,
            layer_types=_alternating(N_LAYERS),
        ),
    )


def _gemma3_text() -> PreTrainedModel:
    return _build(Gemma3ForCausalLM, _gemma3_text_config())


def _gemma3_vlm() -> PreTrainedModel:
    vision = SiglipVisionConfig(
        hidden_size=32,  # the same width and depth as the text model, to mislead a naive search
        intermediate_size=32,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = Gemma3Config(
        text_config=_gemma3_text_config(),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=VOCAB_SIZE,
        eoi_token_index=VOCAB_SIZE + 1,
        image_token_index=VOCAB_SIZE + 2,
        **_IDS,
    )
    return _build(Gemma3ForConditionalGeneration, config)


def _mistral() -> PreTrainedModel:
    return _build(MistralForCausalLM, MistralConfig(**_TEXT, sliding_window=MISTRAL_WINDOW))


def _phi3() -> PreTrainedModel:
    return _build(Phi3ForCausalLM, Phi3Config(**_TEXT))


def _olmo2() -> PreTrainedModel:
    return _build(Olmo2ForCausalLM, Olmo2Config(**_TEXT))


def _gpt_neox() -> PreTrainedModel:
    keys = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
    return _build(GPTNeoXForCausalLM, GPTNeoXConfig(**keys))


def _gpt2() -> PreTrainedModel:
    return _build(
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=1024,
            n_embd=_TEXT["hidden_size"],
            n_layer=N_LAYERS,
            n_head=_TEXT["num_attention_heads"],
            **_IDS,
        ),
    )


def _mpt() -> PreTrainedModel:
    """ALiBi: keys are weighed by their column, not by their position."""
    return _build(
        MptForCausalLM,
        MptConfig(
            vocab_size=VOCAB_SIZE,
            d_model=_TEXT["hidden_size"],
            n_layers=N_LAYERS,
            n_heads=_TEXT["num_attention_heads"],
            expansion_ratio=4,
            max_seq_len=1024,
            **_IDS,
        ),
    )


def _gpt_neo() -> PreTrainedModel:
    """Every other layer sees the last `GPT_NEO_WINDOW` columns, padding among them."""
    return _build(
        GPTNeoForCausalLM,
        GPTNeoConfig(
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=1024,
            hidden_size=_TEXT["hidden_size"],
            num_layers=N_LAYERS + 1,
            attention_types=[[["global", "local"], (N_LAYERS + 1) // 2]],
            num_heads=_TEXT["num_attention_heads"],
            window_size=GPT_NEO_WINDOW,
            **_IDS,
        ),
    )


def _longrope() -> PreTrainedModel:
    """Short or long factors for all rows of a batch, by its longest (Phi-3.5)."""
    factors = {"short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 8.0, 16.0]}
    return _build(
        Phi3ForCausalLM,
        Phi3Config(
            **_TEXT,
            original_max_position_embeddings=LONGROPE_FROM,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": LONGROPE_FROM,
                **factors,
            },
        ),
    )


def _dynamic_rope() -> PreTrainedModel:
    """Positions stretched by the length of the longest row."""
    sizes = {**_TEXT, "max_position_embeddings": LONGROPE_FROM}
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    return _build(LlamaForCausalLM, LlamaConfig(**sizes, rope_parameters=scaling))


def _gemma4() -> PreTrainedModel:
    """The last two layers take the keys and values of layers below them."""
    return _build(
        Gemma4ForCausalLM,
        Gemma4TextConfig(
            **_TEXT,
            head_dim=8,
            sliding_window=SLIDING_WINDOW,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB_SIZE,
            num_kv_shared_layers=2,
            layer_types=[_ALTERNATING[i in (1, 4)] for i in range(N_LAYERS)],
        ),
    )


def _lfm2() -> PreTrainedModel:
    """Short convolutions and attention."""
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
    return _build(
        Lfm2ForCausalLM,
        Lfm2Config(**_TEXT, layer_types=kinds, block_multiple_of=8),
    )


def _qwen3_5() -> PreTrainedModel:
    """Linear attention with a gate, and attention."""
    kinds = [("linear_attention", "full_attention")[i % 2] for i in range(N_LAYERS)]
    return _build(
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig(
            **_TEXT,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=kinds,
        ),
    )


def _mamba() -> PreTrainedModel:
    """States alone."""
    sizes = {key: _TEXT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    return _build(MambaForCausalLM, MambaConfig(**sizes, state_size=8, **_IDS))


def _openai_gpt() -> PreTrainedModel:
    """Keeps nothing between tokens."""
    return _build(
        OpenAIGPTLMHeadModel,
        OpenAIGPTConfig(
            vocab_size=VOCAB_SIZE,
            n_positions=1024,
            n_embd=_TEXT["hidden_size"],
            n_layer=N_LAYERS,
            n_head=_TEXT["num_attention_heads"],
            **_IDS,
        ),
    )


def _qwen2_5_vl() -> PreTrainedModel:
    """A text decoder within a model that also sees; it has no class of its own."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return _build(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
            },
            **_IDS,
        ),
    )


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gemma3_vlm": _gemma3_vlm,
    "mistral": _mistral,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}
"""Those whose rows may be padded, cached, cut, and entered at any layer."""

DEMANDING: dict[str, Callable[[], PreTrainedModel]] = {
    "mpt": _mpt,
    "gpt_neo": _gpt_neo,
    "longrope": _longrope,
    "dynamic_rope": _dynamic_rope,
    "gemma4": _gemma4,
    "lfm2": _lfm2,
    "qwen3_5": _qwen3_5,
    "mamba": _mamba,
    "openai_gpt": _openai_gpt,
    "qwen2_5_vl": _qwen2_5_vl,
}
"""Those that do not bear all of it, or take more to be loaded."""


def randomize(model: PreTrainedModel) -> None:
    """Redraw the weights, larger than an initialiser would: edits and positions must matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.3)
            else:  # norms and biases: disturbed, so that leaving one out shows
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # Small logits for <|im_end|>, <pad> and what is not in the tokenizer: never the largest,
        # so that nothing ends by chance.
        embeddings = model.get_output_embeddings()
        if isinstance(getattr(embeddings, "weight", None), torch.Tensor):  # some have several
            embeddings.weight[IM_END_ID:] *= 0.01


def make_model_dir(
    family: str,
    directory: Path,
    *,
    chat_template: str | None = CHATML,
    dtype: torch.dtype = torch.float32,
    eos_early: bool = False,
) -> Path:
    """Build, seed and save one tiny model with its tokenizer; returns the directory.

    With `eos_early` about a fifth of the vocabulary are end-of-sequence ids (a list, in both
    the config and the generation config), so greedy continuations end at varied places within
    12 tokens: best on llama, qwen2 and phi3; Gemma-3 repeats itself and seldom ends.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = {**FAMILIES, **DEMANDING}[family]()
        randomize(model)
    eos = EARLY_EOS_IDS if eos_early else IM_END_ID
    model.config.eos_token_id = eos
    model.config.get_text_config().eos_token_id = eos
    assert model.generation_config is not None
    model.generation_config.eos_token_id = eos
    model.generation_config.bos_token_id = IM_START_ID
    model.generation_config.pad_token_id = PAD_ID
    model.to(dtype)  # type: ignore[arg-type]
    model.save_pretrained(str(directory))
    save_tokenizer(directory, chat_template)
    return directory
