"""Where a model keeps its decoder layers, found from its module tree.

No table of model names: the decoder layers are the one `torch.nn.ModuleList` that has as many
members as the text configuration has layers and stands in the text decoder (not in a vision or
audio tower).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: What families call the norm that a decoder layer begins with.
_INPUT_NORMS = ("input_layernorm", "ln_1")

#: Parts of a multimodal model that hold layer lists of their own.
_TOWERS = ("vision", "visual", "audio", "speech", "image")


@dataclass(frozen=True)
class ModuleTree:
    """The parts of a model that the engine touches.

    Attributes:
        layers: dotted path of the decoder layers, such as ``model.layers``.
        input_norm: name within a decoder layer of the norm that its input goes through first; None
            in architectures without one (OLMo 2 normalises after the block).
        n_layers: how many decoder layers there are.
        d_model: width of the residual stream.
        d_mlp: width of the MLP's hidden layer.
        vocab_size: rows of the output embedding.
        kv_bytes: bytes that one token takes in the KV cache, all layers together.
        max_length: tokens that the model has positions for.
        window: tokens that the shortest sliding attention window holds.
        keeps_states: whether a layer keeps something else than keys and values between tokens.
    """

    layers: str
    input_norm: str | None
    n_layers: int
    d_model: int
    d_mlp: int
    vocab_size: int
    kv_bytes: int
    max_length: int
    window: int
    keeps_states: bool


def find_tree(model: PreTrainedModel, dtype: torch.dtype) -> ModuleTree:
    """Find the decoder layers of a (possibly weightless) causal language model.

    Raises:
        PersonaError: no module list fits, or more than one does; the message says what was looked
            for and what was found.
    """
    config = model.config.get_text_config(decoder=True)
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    }
    fitting = [
        name
        for name, length in lists.items()
        if 0 < length == n_layers and not any(tower in name.lower() for tower in _TOWERS)
    ]
    if len(fitting) > 1 and hasattr(model, "get_decoder"):
        # A tower that hears or sees may have as many layers as the text decoder.
        inside = set(model.get_decoder().modules())
        fitting = [name for name in fitting if model.get_submodule(name) in inside]
    if n_layers is None or len(fitting) != 1:
        seen = ", ".join(f"{name} ({length})" for name, length in lists.items()) or "none"
        wanted = "all" if n_layers is None else n_layers
        raise PersonaError(
            f"Cannot find the decoder layers of a {type(model).__name__}: looked for one list of "
            f"{wanted} modules outside a vision or audio tower, such as model.layers or "
            f"transformer.h, and the module lists here are {seen}; please report the architecture."
        )
    kept = DynamicCache(config=model.config).layers
    windows = [
        layer.sliding_window for layer in kept if isinstance(layer, DynamicSlidingWindowLayer)
    ]
    first = next(model.get_submodule(fitting[0]).children())
    children = dict(first.named_children())
    return ModuleTree(
        layers=fitting[0],
        input_norm=next((name for name in _INPUT_NORMS if name in children), None),
        n_layers=n_layers,
        d_model=config.hidden_size,
        d_mlp=max(
            _number(own, "intermediate_size") or 4 * config.hidden_size
            for own in _layer_configs(config)
        ),
        vocab_size=config.vocab_size,
        kv_bytes=2 * dtype.itemsize * sum(map(_key_width, _layer_configs(config))),
        max_length=_max_length(config),
        window=min(windows, default=sys.maxsize),
        keeps_states=any(
            isinstance(layer, LinearAttentionCacheLayerMixin) or not isinstance(layer, DynamicLayer)
            for layer in kept
        ),
    )


def _layer_configs(config: PretrainedConfig) -> list[Any]:
    """The configuration of every decoder layer, which families such as Gemma 4 vary by layer."""
    view = getattr(config, "per_layer_config", None)
    layers = range(config.num_hidden_layers)
    return [config if view is None else view[layer] for layer in layers]


def _number(config: Any, name: str) -> int | None:
    """A size in a configuration, the largest where it is given by layer; None where it is not."""
    value = getattr(config, name, None)
    return max(value, default=None) if isinstance(value, list | tuple) else value


def _key_width(config: Any) -> int:
    """Numbers that the keys of one token have in a layer."""
    queries = _number(config, "num_attention_heads")
    if not queries:
        return 0
    heads = _number(config, "num_key_value_heads") or queries
    return heads * (_number(config, "head_dim") or config.hidden_size // queries)


def _max_length(config: PretrainedConfig) -> int:
    """Tokens that a model has positions for."""
    length = _number(config, "max_position_embeddings") or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":  # stretched from this length on
        length = int(length * rope.get("factor", 1.0))
    return length


def check_residual(name: str, shape: tuple[int, ...], rows: int, tree: ModuleTree) -> None:
    """Refuse a model whose decoder layers hand on something else than one residual stream.

    Args:
        name: of the model's class.
        shape: of what a layer was given.
        rows: how many rows there were.
        tree: the map of the model.

    Raises:
        PersonaError: it is not [rows, tokens, d_model].
    """
    if len(shape) != 3 or shape[0] != rows or shape[-1] != tree.d_model:
        raise PersonaError(
            f"The decoder layers of a {name} are given {list(shape)} and not [rows, tokens, "
            f"{tree.d_model}]; only models with one residual stream are supported."
        )


def has_few_bits(dtype: torch.dtype) -> bool:
    """Whether a model's dtype has fewer bits than float32, so that its rounding shows in KLs."""
    return dtype.itemsize < torch.float32.itemsize
