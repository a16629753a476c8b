"""On this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from persona_nnsight.backends import EngineFunction
from persona_nnsight.costs import Limits, check_budget, default_budget, fit_limits
from persona_nnsight.engine import Event
from persona_nnsight.errors import PersonaError
from persona_nnsight.models import Model
from persona_nnsight.plan import Plan


class LocalBackend:
    """Runs on a model that was loaded with its weights.

    Args:
        model: with its weights.
        memory_budget: bytes that a run may take beside the weights, on the device that computes;
            None for half of what is free there when it begins.
    """

    def __init__(self, model: Model, *, memory_budget: int | None = None) -> None:
        self.model = model
        self.memory_budget = memory_budget

    def limits(self, plan: Plan) -> Limits:
        """Batches that fit in the memory budget.

        Raises:
            PersonaError: not even one cell does.
        """
        device, tree = self.model.device, self.model.tree
        budget = self.memory_budget
        if budget is None:
            budget = default_budget(device)
        else:
            check_budget(plan, tree, budget)
        return fit_limits(plan, tree, budget=budget, gpu=device != "cpu")

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
