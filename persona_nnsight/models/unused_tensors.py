"""Tensors of a checkpoint that the loaded model has no place for, which would be left out unsaid.

A bias, a layer or an adapter's matrix that the configuration does not know changes every residual.
What holds nothing that was learned, such as a mask or rotary frequencies that old checkpoints
store, is told by its values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from persona_nnsight.errors import PersonaError
from persona_nnsight.models.weights.model_files import weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from persona_nnsight.models.weights.resolve import Weights

_MINUS_INFINITY = -1e4  # what old checkpoints store to mask with is this or less


def refuse_unused(
    source: Weights,
    config: PretrainedConfig,
    module: PreTrainedModel,
    unexpected: Collection[str],
) -> None:
    """Refuse a model whose files hold more than was loaded from them.

    Args:
        source: where the model was loaded from.
        config: what config.json says, of the whole model.
        module: the loaded model.
        unexpected: the tensors for which transformers found no place, less those that it declares
            to be ignorable.

    Raises:
        PersonaError: there are such tensors; two for one place; an output embedding of its own
            where config.json ties it to the input's; or quantised numbers without their scale.
    """
    stored = _stored(Path(source.path))
    unused = sorted(unexpected)
    if unused:  # which is rare, and what follows takes long
        elsewhere = _whole_model(config, module)
        unused = [
            name
            for name in unused
            if name not in elsewhere
            and not (name in stored and _is_constant(_read(stored[name][0]), module))
        ]
    if unused:
        raise PersonaError(
            f"The weights of {source.spec!r} hold {_count(unused)} that the model of its "
            f"config.json has no place for ({_first(unused)}), and would be left out; correct "
            "config.json, or fetch or copy the model again, whole."
        )
    # transformers takes names with and without this prefix.
    prefix = f"{module.base_model_prefix}."
    double = sorted(
        name
        for name, (place, *others) in stored.items()
        for other in (*others, *stored.get(prefix + name, ()))
        if not torch.equal(_read(place), _read(other))
    )
    if double:
        raise PersonaError(
            f"The weights of {source.spec!r} hold {_count(double)} twice with other values "
            f"({_first(double)}), of which one would be left out; take one of each away."
        )
    tied = module.get_expanded_tied_weights_keys(all_submodels=True)
    if untied := sorted(set(tied) - set(module.all_tied_weights_keys)):
        raise PersonaError(
            f"The weights of {source.spec!r} hold {_count(untied)} with values of their own "
            f"({_first(untied)}) that its config.json ties to {tied[untied[0]]}; set "
            "tie_word_embeddings in it to false if they belong to the model, or take them away."
        )
    if bare := sorted(_bare(stored, module, hasattr(config, "quantization_config"))):
        raise PersonaError(
            f"The weights of {source.spec!r} hold {_count(bare)} as {stored[bare[0]][0].dtype} "
            f"without the scale that belongs to it ({_first(bare)}); fetch or copy the model "
            "again, whole, or choose one that is not quantised."
        )


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"


def _first(names: list[str]) -> str:
    return f"{names[0]}, ..." if len(names) > 1 else names[0]


class _Place(NamedTuple):
    """Where a tensor is stored, and as which kind of numbers."""

    file: Path
    name: str
    dtype: str


def _stored(directory: Path) -> dict[str, list[_Place]]:
    """The tensors in the weights that are read, by name; shards may have several of one name."""
    from safetensors import safe_open

    found: dict[str, list[_Place]] = {}
    for path in weight_files(directory):
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no dictionary
                place = _Place(path, name, stored.get_slice(name).get_dtype())
                found.setdefault(name, []).append(place)
    return found


def _bare(
    stored: Mapping[str, list[_Place]], module: PreTrainedModel, quantised: bool
) -> Iterator[str]:
    """Tensors of quantised numbers that were taken for the numbers themselves.

    Integers are no weights without a scale beside them; 8-bit floats may be, unless config.json
    says that they are quantised.
    """
    parameters = dict(module.named_parameters())
    # A scale is a tensor of the same module, or stands below the weight's own name.
    beside = Counter(name.rpartition(".")[0] for name in stored if not name.endswith(".bias"))
    for name, (place, *_) in stored.items():
        small = place.dtype.startswith("F8") and quantised
        whole = place.dtype.startswith(("F", "BF")) and not small
        alone = beside[name.rpartition(".")[0]] == 1 and name not in beside
        if not whole and alone and name in parameters:
            yield name


def _whole_model(config: PretrainedConfig, module: PreTrainedModel) -> Collection[str]:
    """The tensors of the architecture that config.json names, where it is more than was loaded.

    Of some models that see or hear transformers loads the text model alone (Llama 4). What belongs
    to the rest does nothing on a text.
    """
    import transformers

    if config.get_text_config(decoder=True) is config:  # there is no rest
        return frozenset()
    try:
        named: Any = getattr(transformers, (config.architectures or [""])[0])
        if not issubclass(named, transformers.PreTrainedModel) or isinstance(module, named):
            return frozenset()
        with torch.device("meta"):
            names = set(named(config).state_dict())
    except Exception:  # none is named, or one that cannot be made here
        return frozenset()
    return names | {name.removeprefix(f"{named.base_model_prefix}.") for name in names}


def _read(place: _Place) -> Tensor:
    from safetensors import safe_open

    with safe_open(place.file, "pt") as stored:
        tensor: Tensor = stored.get_tensor(place.name)
    return tensor


def _is_constant(tensor: Tensor, module: PreTrainedModel) -> bool:
    """Whether a tensor holds what the model makes itself, and nothing that was learned."""
    if tensor.numel() == 1:
        return float(tensor) <= _MINUS_INFINITY
    return (
        _is_causal_mask(tensor)
        or _is_counting(tensor)
        or any(_is_same(tensor, buffer) for _, buffer in module.named_buffers())
    )


def _is_causal_mask(tensor: Tensor) -> bool:
    if tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2]:
        return False
    lower = torch.ones(tensor.shape[-2:]).tril()
    return bool((tensor.float() == lower).all())


def _is_counting(tensor: Tensor) -> bool:
    """Whether a tensor numbers positions: 0, 1, 2, …"""
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return False
    return bool((tensor == torch.arange(tensor.shape[-1])).all())


def _is_same(tensor: Tensor, buffer: Tensor) -> bool:
    """Whether a tensor is a buffer of the model, but for the rounding of a smaller dtype."""
    if buffer.device.type == "meta" or tensor.shape != buffer.shape:
        return False
    return torch.allclose(tensor.float(), buffer.cpu().float(), rtol=0.01, atol=1e-6)
