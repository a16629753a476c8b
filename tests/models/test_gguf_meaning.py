"""GGUF files: what they say beside their tensors means what it meant before it was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import VOCAB_SIZE, export
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from persona_nnsight import load_model
from persona_nnsight.errors import PersonaError
from persona_nnsight.models.weights.resolve import resolve

CONTEXT = 64
"""Tokens of the original context; texts go beyond it."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
HEAD = 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))


def model_of(config: PreTrainedConfig) -> Any:
    """A model of loud random weights, so that what is left out shows."""
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
        model.eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.data, 1.0 if parameter.dim() == 1 else 0, 0.3)
        model.tie_weights()
    return model


@torch.no_grad()
def hidden_states(model: Any, tokens: int) -> Tensor:
    ids = torch.arange(tokens)[None] * 7 % 250
    states = model(ids, output_hidden_states=True)
    return torch.cat([*states.hidden_states, states.logits], dim=-1)


def converted(gguf: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(resolve(str(gguf)).path, attn_implementation="eager").eval()


def refusal(gguf: Path) -> str:
    with pytest.raises(PersonaError) as caught:
        resolve(str(gguf))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not list(gguf.parent.glob("cache/models/*"))
    return message


# ------------------------------------------------------------------------------- what is meant


def llama3_factors(
    base: float, factor: float, low: float, high: float, context: int, head: int = HEAD
) -> Tensor:
    """As llama.cpp's converter works them out."""
    factors = []
    for pair in range(head // 2):
        wave = 2 * math.pi * base ** (2 * pair / head)
        if wave < context / high:
            factors.append(1.0)
        elif wave > context / low:
            factors.append(factor)
        else:
            smooth = (context / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def llama3(theta: float, factor: float, low: float, high: float, context: int) -> Case:
    values = {
        "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": context, "rope_theta": theta,
    }  # fmt: skip
    return (
        LlamaConfig(**SIZES, **rope("llama3", **values)),
        "llama",
        {"llama.rope.freq_base": theta, "llama.rope.dimension_count": HEAD},
        {"rope_freqs.weight": llama3_factors(theta, factor, low, high, context)},
    )


def phi3(**more: Any) -> Case:
    short, long = torch.linspace(1, 1.5, 8), torch.linspace(1.2, 20, 8)
    scaled = {
        "short_factor": short.tolist(), "long_factor": long.tolist(),
        "original_max_position_embeddings": CONTEXT,
    }  # fmt: skip
    amplitude = math.sqrt(1 + math.log(1024 / CONTEXT) / math.log(CONTEXT))
    return (
        Phi3Config(
            **SIZES,
            **rope("longrope", **scaled),
            original_max_position_embeddings=CONTEXT,
            pad_token_id=0,
            **more,
        ),
        "phi3",
        {
            "phi3.rope.dimension_count": HEAD,
            "phi3.rope.scaling.attn_factor": amplitude,
            "phi3.rope.scaling.original_context_length": CONTEXT,
            **{f"phi3.attention.{name}": value for name, value in more.items()},
        },
        {"rope_factors_short.weight": short, "rope_factors_long.weight": long},
    )


def gemma3(**more: Any) -> Gemma3TextConfig:
    own = {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 24}
    return Gemma3TextConfig(**SIZES | {"tie_word_embeddings": True} | own | more)


GEMMA3_KEYS: dict[str, object] = {
    "gemma3.rope.freq_base": 1000000.0,
    "gemma3.attention.key_length": HEAD,
    "gemma3.attention.value_length": HEAD,
    "gemma3.attention.sliding_window": 24,
}
YARN = {"factor": 8.0, "original_max_position_embeddings": CONTEXT}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": CONTEXT,
    "rope.scaling.finetuned": True,
}

Case = tuple[PreTrainedConfig, str, dict[str, object], dict[str, Tensor]]


def below(architecture: str, **keys: object) -> dict[str, object]:
    return {f"{architecture}.{key}": value for key, value in keys.items()}


#: By case: the configuration that a file is written from, what GGUF calls its kind, and the keys
#: and tensors that are written beside the usual ones.
MEANT: dict[str, Callable[[], Case]] = {
    "llama": lambda: (LlamaConfig(**SIZES), "llama", {"llama.rope.dimension_count": HEAD}, {}),
    "another base": lambda: (
        LlamaConfig(**SIZES, **rope("default", rope_theta=500.0)),
        "llama",
        {"llama.rope.freq_base": 500.0},
        {},
    ),
    "linear": lambda: (
        LlamaConfig(**SIZES, **rope("linear", factor=4.0)),
        "llama",
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {},
    ),
    "linear, said in the old way": lambda: (
        LlamaConfig(**SIZES, **rope("linear", factor=4.0)),
        "llama",
        {"llama.rope.scale_linear": 4.0},
        {},
    ),
    "no scaling": lambda: (
        LlamaConfig(**SIZES),
        "llama",
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {},
    ),
    "yarn": lambda: (
        LlamaConfig(**SIZES, **rope("yarn", **YARN)), "llama", below("llama", **YARN_KEYS), {},
    ),
    "yarn of Qwen 2": lambda: (
        Qwen2Config(**SIZES, **rope("yarn", **YARN)), "qwen2", below("qwen2", **YARN_KEYS), {},
    ),
    "yarn with betas": lambda: (
        LlamaConfig(**SIZES, **rope("yarn", **YARN, beta_fast=20.0, beta_slow=2.0)),
        "llama",
        below("llama", **YARN_KEYS, **{
            "rope.scaling.yarn_beta_fast": 20.0, "rope.scaling.yarn_beta_slow": 2.0,
        }),
        {},
    ),
    "yarn with another amplitude": lambda: (
        LlamaConfig(
            **SIZES, **rope("yarn", **YARN, attention_factor=1.5 * (1 + 0.1 * math.log(8)))
        ),
        "llama",
        below("llama", **YARN_KEYS, **{"rope.scaling.attn_factor": 1.5}),
        {},
    ),
    "llama 3": lambda: llama3(10000.0, 8.0, 1.0, 4.0, CONTEXT),
    "llama 3.2, a larger base": lambda: llama3(500000.0, 32.0, 1.0, 4.0, 8192),
    "llama 3, other bounds": lambda: llama3(10000.0, 8.0, 2.0, 16.0, 512),
    "llama 3, one pair between the bounds": lambda: llama3(10000.0, 4.0, 1.0, 1.5, 90),
    "llama 3, no pair between the bounds": lambda: llama3(10000.0, 4.0, 1.0, 1.1, 30),
    "factors of any kind": lambda: (
        LlamaConfig(
            **SIZES,
            **rope(
                "longrope",
                short_factor=[1.0, 3.0, 2.0, 5.0, 1.0, 1.0, 9.0, 4.0],
                long_factor=[1.0, 3.0, 2.0, 5.0, 1.0, 1.0, 9.0, 4.0],
                original_max_position_embeddings=1024,
                attention_factor=1.0,
            ),
        ),
        "llama",
        {},
        {"rope_freqs.weight": torch.tensor([1.0, 3.0, 2.0, 5.0, 1.0, 1.0, 9.0, 4.0])},
    ),
    "factors of one": lambda: (
        LlamaConfig(**SIZES), "llama", {}, {"rope_freqs.weight": torch.ones(8)},
    ),
    "longrope": phi3,
    "longrope and a window": lambda: phi3(sliding_window=24),
    "a part of each head turns": lambda: (
        Phi3Config(**SIZES, **rope("default", partial_rotary_factor=0.5), pad_token_id=0),
        "phi3",
        {"phi3.rope.dimension_count": HEAD // 2},
        {},
    ),
    "Qwen 3's wider heads": lambda: (
        Qwen3Config(**SIZES, head_dim=32, **rope("default", rope_theta=1e6)),
        "qwen3",
        {"qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32,
         "qwen3.rope.freq_base": 1e6},
        {},
    ),
    "Gemma 2's caps": lambda: (
        Gemma2Config(
            **SIZES | {"tie_word_embeddings": True}, head_dim=HEAD, query_pre_attn_scalar=HEAD,
            sliding_window=24, attn_logit_softcapping=7.0, final_logit_softcapping=3.0,
        ),
        "gemma2",
        {"gemma2.attention.key_length": HEAD, "gemma2.attention.value_length": HEAD,
         "gemma2.attention.sliding_window": 24, "gemma2.attn_logit_softcapping": 7.0,
         "gemma2.final_logit_softcapping": 3.0},
        {},
    ),
    "Gemma 3": lambda: (gemma3(), "gemma3", GEMMA3_KEYS, {}),
    "Gemma 3, scaled where it does not slide": lambda: (
        gemma3(
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "gemma3",
        GEMMA3_KEYS
        | {
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
            "gemma3.rope.freq_base_swa": 500.0,
            "gemma3.attention.sliding_window_pattern": [True, False, True],
        },
        {},
    ),
    "StableLM": lambda: (
        StableLmConfig(**SIZES, **rope("default", partial_rotary_factor=0.5)),
        "stablelm",
        {"stablelm.rope.dimension_count": HEAD // 2, "stablelm.use_parallel_residual": False},
        {},
    ),
    "StarCoder 2's base": lambda: (
        Starcoder2Config(**SIZES, norm_epsilon=1e-3, **rope("default", rope_theta=500.0)),
        "starcoder2",
        {"starcoder2.rope.freq_base": 500.0},
        {},
    ),
    "GPT-2": lambda: (
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=128, n_embd=64, n_layer=2, n_head=4, n_inner=48,
        ),
        "gpt2",
        {},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MEANT)
def test_a_file_means_what_it_was_written_from(tmp_path: Path, case: str) -> None:
    config, architecture, keys, tensors = MEANT[case]()
    model = model_of(config)
    read = converted(export(model, tmp_path / "m.gguf", architecture, keys=keys, tensors=tensors))
    for tokens in (CONTEXT // 2, CONTEXT + 40):  # short factors, and long ones
        expected = hidden_states(model, tokens)
        torch.testing.assert_close(hidden_states(read, tokens), expected, rtol=1e-3, atol=2e-3)


# ------------------------------------------------------------------------- what cannot be meant


def llama_with(keys: dict[str, object] | None = None, **tensors: Tensor) -> Callable[[Path], Path]:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}

    def write(path: Path) -> Path:
        return export(model_of(LlamaConfig(**SIZES)), path, "llama", keys=keys, tensors=named)

    return write


def phi3_short_alone(path: Path) -> Path:
    config, _, keys, tensors = phi3()
    tensors.pop("rope_factors_long.weight")
    return export(model_of(config), path, "phi3", keys=keys, tensors=tensors)


def mixture_as_llama(path: Path) -> Path:
    return llama_with({"llama.expert_count": 8, "llama.expert_used_count": 2})(path)


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a key that nobody knows": (
        llama_with({"llama.attention.new_trick": 3}),
        "says llama.attention.new_trick = '3', which a LlamaConfig cannot hold",
    ),
    "a key that the architecture does not take": (
        llama_with({"llama.residual_scale": 0.5}),
        "says llama.residual_scale = '0.5', which a LlamaConfig cannot hold",
    ),
    "experts": (mixture_as_llama, "says llama.expert_count = '8', which a LlamaConfig cannot hold"),
    "attention that looks ahead": (
        llama_with({"llama.attention.causal": False}),
        "says llama.attention.causal = 'False'",
    ),
    "values of another width than keys": (
        llama_with({"llama.attention.key_length": HEAD, "llama.attention.value_length": 2 * HEAD}),
        "says llama.attention.key_length = '16'",
    ),
    "an unknown scaling of positions": (
        llama_with({"llama.rope.scaling.alpha": 2.0}),
        "says llama.rope.scaling.alpha = '2.0'",
    ),
    "a part of each head turns": (
        llama_with({"llama.attention.key_length": HEAD, "llama.rope.dimension_count": HEAD // 2}),
        "says by llama.rope.dimension_count how positions turn queries and keys",
    ),
    "factors for short texts alone": (
        phi3_short_alone,
        "says by rope_factors_short.weight, phi3.rope.scaling.attn_factor, ",
    ),
    "too many factors": (
        llama_with(rope_freqs__weight=torch.ones(3)),
        "says by rope_freqs.weight how positions turn queries and keys",
    ),
    "a key of another architecture": (
        llama_with({"qwen2.rope.scaling.factor": 4.0}),
        "(architecture 'llama') says qwen2.rope.scaling.factor = '4.0'",
    ),
    "an adapter": (
        llama_with({"general.type": "adapter", "adapter.type": "lora"}),
        "holds no model but is of the type 'adapter'",
    ),
    "a part of a model": (llama_with({"split.count": 3}), "is one of 3 parts of a model"),
    "a bias": (
        llama_with(blk__0__attn_q__bias=torch.ones(64)),
        "holds 1 tensor that a LlamaForCausalLM has no place for (blk.0.attn_q.bias)",
    ),
    "a layer more": (
        llama_with(
            blk__3__attn_norm__weight=torch.ones(64), blk__3__ffn_norm__weight=torch.ones(64)
        ),
        "holds 2 tensors that a LlamaForCausalLM has no place for (blk.3.attn_norm.weight, ...)",
    ),
    "factors of one layer": (
        llama_with(blk__0__rope_freqs__weight=torch.ones(8)),
        "has no place for (blk.0.rope_freqs.weight)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_configuration_holds_is_named(tmp_path: Path, case: str) -> None:
    write, says = REFUSED[case]
    assert says in refusal(write(tmp_path / "m.gguf"))


def test_end_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    """That of a turn beside that of a text, which is all that transformers' loader reads."""
    ends: dict[str, object] = {
        "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9,
    }  # fmt: skip
    model = model_of(LlamaConfig(**SIZES))
    gguf = export(model, tmp_path / "m.gguf", "llama", keys=ends)
    assert load_model(str(gguf)).eos_ids == (7, 9, VOCAB_SIZE - 2)  # and <|im_end|>


def test_a_file_without_an_end_token_has_no_default(tmp_path: Path) -> None:
    """That of Llama's class is 2, an ordinary letter here; the template's remains."""
    model = model_of(LlamaConfig(**SIZES))
    gguf = export(model, tmp_path / "m.gguf", "llama", eos=False)
    assert load_model(str(gguf)).eos_ids == (VOCAB_SIZE - 2,)


def test_notes_say_nothing_of_the_model(tmp_path: Path) -> None:
    notes: dict[str, object] = {
        "general.type": "model",
        "general.quantization_version": 2,
        "general.tags": ["a", "b"],
        "general.sampling.top_k": 64,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_bos_token": True,
        "quantize.imatrix.file": "imatrix.dat",
        "quantize.imatrix.entries_count": 3,
        "imatrix.chunk_count": 7,
        "somebody.quantised_on": "a rainy day",
        "split.count": 1,
        "llama.pooling_type": 1,
        "llama.rope.scaling.finetuned": False,
        "llama.rope.scaling.yarn_log_multiplier": 0.0,
        "llama.attention.causal": True,
        "llama.attention.clamp_kqv": 0.0,
        "llama.attention.key_length": HEAD,
        "llama.attention.value_length": HEAD,
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.vocab_size": VOCAB_SIZE,
        "llama.tensor_data_layout": "Meta AI original pth",
    }
    model = model_of(LlamaConfig(**SIZES))
    read = converted(export(model, tmp_path / "m.gguf", "llama", keys=notes))
    expected = hidden_states(model, 50)
    torch.testing.assert_close(hidden_states(read, 50), expected, rtol=1e-3, atol=2e-3)
