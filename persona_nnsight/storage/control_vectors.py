"""Persona effects as llama.cpp control vectors: one GGUF file per persona.

The layout, read from the sources of the programs that use it:

* llama.cpp (ggml-org/llama.cpp). ``common_control_vector_load_one`` (common/common.cpp) takes
  one-dimensional float32 tensors ``direction.<k>``, refuses the whole file where k is 0, and reads
  no metadata. ``llama_adapter_cvec::apply`` (src/llama-adapter.cpp) pairs direction k with
  decoder block k, and ``apply_to`` adds it to that block's output at every position; block 0 and
  blocks without a direction add nothing.
* repeng (vgel/repeng). ``ControlVector.export_gguf`` (repeng/extract.py) writes the architecture
  ``controlvector``, the model type as ``controlvector.model_hint`` and the number of directions,
  not of layers, as uint32 ``controlvector.layer_count``; ``import_gguf`` needs the hint. Its
  directions belong to block outputs too (``batched_get_hiddens``, ``ControlModule.forward``).

The residual at layer L is the *input* of decoder block L, which is the output of block L - 1, so
Δ_X at layer L becomes ``direction.<L-1>``. Layers 0 (the embedding) and 1 (it would be direction
0) cannot be expressed and are left out.

A control vector is not quite what `persona_nnsight.experiments.inject` does: it is added at every
position, not written at one. And directions add up, because what block k adds is carried on to the
later blocks, which add theirs. ``--control-vector-layer-range k k`` applies one of them alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from persona_nnsight.errors import PersonaError
from persona_nnsight.storage.files import write_new
from persona_nnsight.storage.vectors import Vectors

_ARCHITECTURE = "controlvector"

#: Δ_X at this layer becomes direction 1, the first that llama.cpp takes.
FIRST_LAYER = 2


def write_control_vector(
    vectors: Vectors, persona: str, path: str | Path, position: str = "p_last"
) -> Path:
    """Write Δ_X of one persona as a control vector and return the file's path.

    Args:
        vectors: the saved effects.
        persona: key of the persona.
        path: where the file goes; missing directories are made.
        position: which of the file's positions the effect is taken from.

    Raises:
        PersonaError: the persona or position is not in `vectors`, none of its layers can be
            expressed, or `path` exists already or cannot be written.
    """
    directions = {
        layer - 1: vectors.delta_x_at(persona, position, layer).detach().cpu().numpy()
        for layer in vectors.layers
        if layer >= FIRST_LAYER
    }
    if not directions:
        raise PersonaError(
            f"The vectors hold layers {', '.join(map(str, vectors.layers))} only, and a control "
            f"vector starts at layer {FIRST_LAYER} (llama.cpp adds nothing to the output of its "
            "first block); save vectors at higher layers."
        )
    return write_new(path, lambda partial: _write(partial, vectors.architecture, directions))


def _write(path: Path, model_hint: str, directions: dict[int, np.ndarray]) -> None:
    writer = GGUFWriter(path, _ARCHITECTURE)
    try:
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(direction))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
