"""persona-nnsight: how a language model combines who it is asked to be with what it is asked to do.

>>> from persona_nnsight import Grid, load_model, substitute
>>> model = load_model("smollm2-135m")                                        # doctest: +SKIP
>>> result = substitute(model, Grid.load("short"), layers="25%,40%")          # doctest: +SKIP
>>> result.summary()                                                          # doctest: +SKIP

Names are imported when they are first used, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from persona_nnsight.experiments.registry import NAMES

if TYPE_CHECKING:
    from persona_nnsight.analysis.columns import read_table
    from persona_nnsight.errors import PersonaError
    from persona_nnsight.experiments.execution import Interrupted
    from persona_nnsight.experiments.registry import *  # noqa: F403
    from persona_nnsight.experiments.results import CaptureResult, EditResult, MarkersResult
    from persona_nnsight.models.loading import Model, load_model
    from persona_nnsight.prompts.grids import Cell, Grid, Persona, Task
    from persona_nnsight.reproduction.reproduce import reproduce
    from persona_nnsight.storage.vectors import Vectors

__all__ = [
    "CaptureResult",
    "Cell",
    "EditResult",
    "Grid",
    "Interrupted",
    "MarkersResult",
    "Model",
    "Persona",
    "PersonaError",
    "Task",
    "Vectors",
    "load_model",
    "read_table",
    "reproduce",
    *NAMES,
]

_HOME = {
    "PersonaError": "errors",
    "Interrupted": "experiments.execution",
    **{name: f"experiments.{name}" for name in NAMES},
    **dict.fromkeys(("Cell", "Grid", "Persona", "Task"), "prompts.grids"),
    **dict.fromkeys(("Model", "load_model"), "models.loading"),
    **dict.fromkeys(("CaptureResult", "EditResult", "MarkersResult"), "experiments.results"),
    "read_table": "analysis.columns",
    "reproduce": "reproduction.reproduce",
    "Vectors": "storage.vectors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
