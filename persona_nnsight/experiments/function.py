"""Experiments as functions: what is called in Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from persona_nnsight.experiments.experiment import Experiment

if TYPE_CHECKING:
    from persona_nnsight.experiments.results import Result
    from persona_nnsight.models.loading import Model
    from persona_nnsight.prompts.grids import Grid

P = ParamSpec("P")
R = TypeVar("R", bound="Result")


def function_of(experiment: Callable[P, Experiment[R]]) -> Callable[Concatenate[Model, Grid, P], R]:
    """An experiment as a function of a model, a grid and the experiment's own arguments.

    The function raises `PersonaError` for bad input and values that are not finite, and
    `Interrupted`, which holds what was finished, on Ctrl-C.
    """

    def function(model: Model, grid: Grid, /, *args: P.args, **kwargs: P.kwargs) -> R:
        from persona_nnsight.experiments.execution import Study, execute

        asked = experiment(*args, **kwargs)
        study = Study(asked, grid, asked.plan(model, grid))
        return execute(model, study, asked.progress, asked.backend)

    kind: Any = experiment
    shown: Any = function
    shown.__name__ = shown.__qualname__ = kind.name
    shown.__module__, shown.__doc__ = kind.__module__, kind.__doc__
    first = list(inspect.signature(function).parameters.values())[:2]
    shown.__signature__ = inspect.Signature(
        [*first, *inspect.signature(kind).parameters.values()], return_annotation="Result"
    )
    return function
