"""A rehearsal of a remote run: serialised, read back and run in this process, with no server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from persona_nnsight.backends.interface import EngineFunction
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.backends.wire.session import run_block
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.events import Event
from persona_nnsight.plan.joining import part_of
from persona_nnsight.plan.packing import unpack
from persona_nnsight.plan.plan import Plan


class SimulatedBackend(LocalBackend):
    """Runs jobs through nnsight's LocalSimulationBackend, with what is not on a server hidden."""

    def run(self, function: EngineFunction, plan: Plan, limits: Limits) -> Iterator[Event]:
        """See `Backend.run`."""
        self._require_weights()
        from nnsight.intervention.backends.local import LocalSimulationBackend

        for start in range(0, len(plan.cells), limits.cells):
            part = part_of(plan, range(start, min(start + limits.cells, len(plan.cells))))
            nnsight_backend = LocalSimulationBackend(self.model.lm)
            answer = run_block(self.model, function, part, None, nnsight_backend)
            assert answer is not None
            yield from unpack(answer["events"], answer["tensors"], start)

    def record(self, plan: Plan | None = None) -> dict[str, Any]:
        """See `Backend.record`."""
        return {"name": "simulate"}
