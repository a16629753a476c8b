"""What every backend does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from persona_nnsight.models.module_tree import ModuleTree
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.events import Done, Event
from persona_nnsight.plan.plan import Plan


class EngineFunction(Protocol):
    """Carries out a plan on an nnsight model, such as `persona_nnsight.engine.run.run`."""

    __module__: str
    __name__: str

    def __call__(
        self, lm: Any, tree: ModuleTree, plan: Plan, limits: Limits, done: Done | None = None, /
    ) -> Iterator[Event]:
        """Carry out what is not done of a plan."""


class Detached(Exception):  # noqa: N818 - nothing went wrong
    """The jobs of a run are with a server, as was asked, and its results are not here yet."""


class Backend(Protocol):
    """Carries out plans, here or elsewhere."""

    def limits(self, plan: Plan) -> Limits:
        """Batch sizes for a plan: how many cells are recorded together or sent as one job."""

    def run(self, function: EngineFunction, plan: Plan, limits: Limits) -> Iterator[Event]:
        """Carry out `plan` with `function`; results come as they are finished.

        Raises:
            PersonaError: bad input, a value that is not finite, or a server that does not do it.
            Detached: the work goes on elsewhere without this process.
        """

    def record(self, plan: Plan | None = None) -> dict[str, Any]:
        """What ``run.json`` says of where a plan was carried out, or all plans; JSON-like data."""

    def close(self) -> None:
        """Let go of what is held for a run."""
