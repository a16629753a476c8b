"""Where the engine runs: on this machine, simulated, or on an NDIF server.

A backend has one way to do work, ``run(function, plan, limits)``, and nothing else in the project
knows where it is done. The modules here:

* `local`: the function is called.
* `simulate`: nnsight's rehearsal of a remote run, in this process.
* `ndif`: the function is sent to an NDIF server, a part of the plan at a time.
* `block`, `shipping`, `there`, `job`, `packing`: what travels there and what comes back.
* `courier`: sends jobs, follows them, takes their results. `server`: the server's HTTP interface.
* `journal`: a run that is not finished, on disk. `ledger`: the jobs in it. `versions`: whether
  client and server understand each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from persona_nnsight.costs import Limits
from persona_nnsight.engine.events import Done, Event
from persona_nnsight.module_tree import ModuleTree
from persona_nnsight.plan import Plan


class EngineFunction(Protocol):
    """Carries out a plan on an nnsight model, such as `persona_nnsight.engine.run`."""

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
