"""What a forward without weights shows of a model: residual stream, and bytes of its cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persona_nnsight.models.module_tree import check_residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from persona_nnsight.models.module_tree import ModuleTree

#: More than the kernel of a short convolution, whose state grows until then.
_TOKENS = 16


def observed(skeleton: PreTrainedModel, tree: ModuleTree) -> ModuleTree:
    """The map of a model, with the bytes that its cache really takes.

    Not every model can run on the meta device; of one that cannot, the map stays as it was read
    from the configuration.

    Args:
        skeleton: the model on the meta device.
        tree: what its configuration says.

    Raises:
        PersonaError: a model whose decoder layers hand on something else than one residual stream.
    """
    shapes: list[tuple[int, ...]] = []

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        shapes.append(tuple(hidden.shape) if isinstance(hidden, Tensor) else ())

    layers = skeleton.get_submodule(tree.layers).children()
    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        bytes_by_length = [_cache_bytes(skeleton, n) for n in (_TOKENS, _TOKENS + 1)]
    except Exception:  # a model asks for a value, and there is none
        bytes_by_length = []
    finally:
        for hook in hooks:
            hook.remove()
    for shape in shapes:
        check_residual(type(skeleton).__name__, shape, 1, tree)
    if not bytes_by_length:
        return tree
    first, second = bytes_by_length
    return replace(tree, kv_bytes=max(second - first, 0))


def _cache_bytes(skeleton: PreTrainedModel, n_tokens: int) -> int:
    """Bytes of a cache after a forward of so many tokens."""
    ids = torch.zeros(1, n_tokens, dtype=torch.long, device="meta")
    with torch.no_grad():
        output = skeleton(input_ids=ids, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    held = [vars(layer).values() for layer in getattr(cache, "layers", ())]
    tensors = [value for values in held for value in values if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
