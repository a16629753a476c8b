"""capture: what persona and task do to the residual stream."""

from __future__ import annotations

from persona_nnsight.backends.interface import Backend
from persona_nnsight.experiments.execution import Progress, execute
from persona_nnsight.experiments.results import CaptureResult
from persona_nnsight.experiments.setup import Layers, Positions, checked, sites_of
from persona_nnsight.method.sites import DEFAULT_LAYERS, DEFAULT_POSITIONS
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.building import build_plan
from persona_nnsight.plan.plan import Plan
from persona_nnsight.prompts.grids import Grid


def plan_capture(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    positions: Positions = DEFAULT_POSITIONS,
    window: int = 10,
) -> Plan:
    """The plan of `capture`, which takes the same arguments."""
    sites = sites_of(model, layers, positions)
    plan = build_plan(
        "capture", model.tokenizer, grid, window=window, keeps_residuals=True, **sites
    )
    return checked(plan, model)


def capture(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    positions: Positions = DEFAULT_POSITIONS,
    window: int = 10,
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> CaptureResult:
    """Record the residuals of BB, XB, BY and XY at every asked site, and how they add up.

    At g1, g2, … all four are teacher-forced on XY's greedy continuation, so positions line up.

    Args:
        model: from `load_model`.
        grid: the cells.
        layers: an expression such as ``4-12`` or ``25%,40%``, or layer numbers.
        positions: names such as ``p_last,g1,g2``.
        window: tokens of XY's continuation that are kept beyond the last position.
        progress: called with (rows done, rows in all).
        backend: what does the work (`persona_nnsight.backends`); None does it here.

    Raises:
        PersonaError: bad input, or a value that is not finite.
        Interrupted: Ctrl-C; holds the finished cells.
    """
    plan = plan_capture(model, grid, layers=layers, positions=positions, window=window)
    result = execute(model, grid, plan, progress, backend)
    assert isinstance(result, CaptureResult)
    return result
