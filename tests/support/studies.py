"""Plans carried out as their experiments would."""

from __future__ import annotations

from typing import Any

from persona_nnsight.experiments.execution import Study
from persona_nnsight.experiments.registry import experiment_named
from persona_nnsight.plan.plan import Plan
from persona_nnsight.prompts.grids import Grid


def study_of(grid: Grid, plan: Plan) -> Study[Any]:
    """The study that a plan is of, whatever has been done to it since."""
    return Study(experiment_named(plan.command)(), grid, plan)
