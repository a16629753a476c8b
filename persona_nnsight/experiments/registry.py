"""The experiments by name: a new one is named here, and is then known wherever one is looked up."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_nnsight.experiments.capture import capture
    from persona_nnsight.experiments.experiment import Experiment
    from persona_nnsight.experiments.inject import inject
    from persona_nnsight.experiments.markers import markers
    from persona_nnsight.experiments.steer import steer
    from persona_nnsight.experiments.substitute import substitute

#: In the order in which commands are listed. The module of each is named like it.
__all__ = ["capture", "substitute", "inject", "markers", "steer"]  # noqa: RUF022

NAMES = tuple(__all__)


def experiment_named(name: str) -> type[Experiment[Any]]:
    """The class of an experiment, from one of `NAMES`."""
    found: type[Experiment[Any]] = getattr(
        import_module(f"persona_nnsight.experiments.{name}"), name.capitalize()
    )
    return found
