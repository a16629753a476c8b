"""The tensors of a GGUF file: which of them transformers' loader would leave out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persona_nnsight.errors import PersonaError
from persona_nnsight.models.weights.gguf_rope import FACTORS, LONG, SHORT

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rotary_factors(reader: Any) -> dict[str, Tensor]:
    """The tensors of a file that say how positions turn, by their names."""
    from gguf import dequantize

    return {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).flatten()
        for tensor in reader.tensors
        if tensor.name in (FACTORS, SHORT, LONG)
    }


def places(reader: Any, model: PreTrainedModel) -> dict[str, str] | None:
    """Where transformers' loader puts the tensors of a file in a model: {name there: name here}.

    None for the architectures that it loads in its newer way, of which it reports itself what it
    had no place for.
    """
    from transformers import modeling_gguf_pytorch_utils
    from transformers.integrations.gguf import is_gguf_arch_supported

    loader: Any = modeling_gguf_pytorch_utils
    architecture = reader.fields["general.architecture"].contents()
    if is_gguf_arch_supported(architecture):
        return None
    processor = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)(config={})
    found: dict[str, str] = loader.get_gguf_hf_weights_map(model, processor)
    return found


def left_out(reader: Any, found: Mapping[str, str]) -> set[str]:
    """The tensors of a file that have none of these places."""
    # Experts that the model keeps together have no ending there.
    return {
        name
        for name in (tensor.name for tensor in reader.tensors)
        if name not in found and name.removesuffix(".weight") not in found
    }


def refuse_left_out(names: Collection[str], model: PreTrainedModel, gguf: str) -> None:
    """Refuse a file, which messages name `gguf`, if there are tensors without a place in a model.

    Raises:
        PersonaError: there are some.
    """
    if names:
        first = f"{min(names)}, ..." if len(names) > 1 else min(names)
        raise PersonaError(
            f"'{gguf}' holds {len(names)} tensor{'s' * (len(names) > 1)} that a "
            f"{type(model).__name__} has no place for ({first}), and would be left out; use the "
            "model's safetensors from the hub."
        )
