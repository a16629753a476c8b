"""On this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from persona_nnsight.backends import EngineFunction
from persona_nnsight.costs import Limits, fit_limits, free_memory
from persona_nnsight.engine import Event
from persona_nnsight.errors import PersonaError
from persona_nnsight.models import Model
from persona_nnsight.plan import Plan


class LocalBackend:
    """Runs on a model that was loaded with its weights."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def limits(self, plan: Plan) -> Limits:
        """Batches that fit in a share of the memory that is free now."""
        device = self.model.device
        return fit_limits(
            plan, self.model.tree, free_bytes=free_memory(device), gpu=device != "cpu"
        )

    def run(self, function: EngineFunction, plan: Plan, limits: Limits) -> Iterator[Event]:
        """See `Backend.run`."""
        self._require_weights()
        return function(self.model.lm, self.model.tree, plan, limits)

    def _require_weights(self) -> None:
        if not self.model.has_weights:
            raise PersonaError(
                "This model was loaded without weights; use load_model(...) as it is."
            )

    def record(self, plan: Plan | None = None) -> dict[str, Any]:
        """See `Backend.record`."""
        return {"name": "local"}

    def close(self) -> None:
        """See `Backend.close`."""
