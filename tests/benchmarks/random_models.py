"""Models with random weights and a real one's shape, made on the device: nothing is downloaded.

Their tokenizer is trained on the texts that will be asked, so that a prompt has about a token a
word, as with a real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from nnsight.modeling.transformers import TransformersModel
from tiny import CHATML, IM_END, IM_START, PAD
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from persona_nnsight import Grid, Model
from persona_nnsight.models.loading import DTYPES, stay
from persona_nnsight.models.module_tree import find_tree
from persona_nnsight.models.weights.resolve import Weights

_SEED = 20260523
_START_ID, _END_ID, _PAD_ID = 0, 1, 2

SPECIAL: dict[str, Any] = {
    "bos_token_id": _START_ID,
    "eos_token_id": _END_ID,
    "pad_token_id": _PAD_ID,
}
"""The special tokens, for a configuration."""

#: Merges to learn: enough that the words of a grid are one token each.
_TRAINED_VOCAB = 4096
#: Standard deviation of a weight times the square root of its inputs. Larger than an initialiser
#: would make it, so that edits matter.
_LOUD = 1.5


def _gemma_2_2b() -> PreTrainedConfig:
    return Gemma2Config(
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        max_position_embeddings=8192,
        sliding_window=4096,
        **SPECIAL,
    )


#: Shapes by name.
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {"gemma-2-2b": _gemma_2_2b}


def texts_of(grids: Iterable[Grid]) -> list[str]:
    """The prompts of grids, to train a tokenizer on."""
    return [
        text
        for grid in grids
        for cell in grid.cells
        for text in (grid.prompt(None, cell.task), grid.prompt(cell.persona, None), cell.task.text)
    ]


def random_model(
    name: str,
    config: PreTrainedConfig,
    texts: Iterable[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
) -> Model:
    """A model as `load_model` would hand it back, with seeded random weights.

    Args:
        name: what it is called.
        config: of a causal language model, with the ids of `SPECIAL`.
        texts: to train its tokenizer on.
        device, dtype: as `load_model` takes them: ``auto`` is the first GPU in bfloat16, or the
            CPU in float32.
    """
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    tokenizer = _tokenizer(texts, config.get_text_config().vocab_size)
    # Models that cap their attention logits need it eager, as `load_model` would choose.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    attention: dict[str, Any] = {"attn_implementation": "eager"} if capped else {}
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(_SEED)
        module: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_config(
            config, dtype=DTYPES[dtype], **attention
        )
        _randomize(module)
    module.eval()
    module.requires_grad_(False)
    return Model(
        lm=TransformersModel(module, task="text-generation", tokenizer=tokenizer, **stay(module)),
        tokenizer=tokenizer,
        weights=Weights(spec=name, path=name, model_id=name, slug=name),
        tree=find_tree(module, DTYPES[dtype]),
        dtype=DTYPES[dtype],
        device=device,
        attention=str(module.config._attn_implementation),
        eos_ids=(_END_ID,),
        architecture=str(config.model_type),
        n_parameters=sum(parameter.numel() for parameter in module.parameters()),
        has_weights=True,
    )


def _randomize(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, _LOUD / parameter.shape[-1] ** 0.5)
        # Small logits for the special tokens: never the largest, so nothing ends by chance.
        cast(Any, model).get_output_embeddings().weight[[_START_ID, _END_ID, _PAD_ID]] *= 0.01


def _tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; ids that were not needed stand for themselves, as ``<300>``."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, _TRAINED_VOCAB),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[IM_START, IM_END, PAD],
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    data = json.loads(core.to_str())
    vocab = data["model"]["vocab"]
    vocab.update({f"<{number}>": number for number in range(len(vocab), vocab_size)})
    make: Any = PreTrainedTokenizerFast  # untyped
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer
