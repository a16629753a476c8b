"""substitute: one residual of the role prompt's run is overwritten at a time."""

from __future__ import annotations

from collections.abc import Iterable

from persona_nnsight.backends.interface import Backend
from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.execution import Progress, execute
from persona_nnsight.experiments.results import EditResult
from persona_nnsight.experiments.setup import Layers, Positions, checked, clean_text, sites_of
from persona_nnsight.method.conditions import SUBSTITUTE_CONDITIONS
from persona_nnsight.method.sites import DEFAULT_LAYERS, DEFAULT_POSITIONS
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.building import build_plan
from persona_nnsight.plan.interventions import Write
from persona_nnsight.plan.plan import Edit, Plan
from persona_nnsight.prompts.grids import Grid


def plan_substitute(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    positions: Positions = DEFAULT_POSITIONS,
    conditions: str | Iterable[str] | None = None,
    window: int = 10,
    generate: int = 0,
    seed: int = 0,
) -> Plan:
    """The plan of `substitute`, which takes the same arguments."""
    sites = sites_of(model, layers, positions)
    edits = [
        Edit(
            Write(condition, (position,), (layer,)),
            generate=0 if condition == "clean" else generate,
        )
        for condition in _conditions(conditions, grid)
        for position in sites["positions"]
        for layer in sites["layers"]
    ]
    if generate:
        edits.append(clean_text(generate))
    plan = build_plan(
        "substitute", model.tokenizer, grid, window=window, edits=edits, seed=seed, **sites
    )
    return checked(plan, model)


def substitute(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    positions: Positions = DEFAULT_POSITIONS,
    conditions: str | Iterable[str] | None = None,
    window: int = 10,
    generate: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> EditResult:
    """Overwrite one residual of the XY run, one site at a time, and measure what changes.

    KL is Σ over the `window` tokens after the site of KL(clean ‖ patched), in nats.

    Args:
        model: from `load_model`.
        grid: the cells.
        layers, positions: the sites; see `capture`.
        conditions: which vectors to write, from `SUBSTITUTE_CONDITIONS`; None for all (without
            ``other_x`` when the grid has a single persona).
        window: tokens per KL.
        generate: also write this many tokens of greedy text per edit.
        seed: of the ``random`` control.
        progress: called with (rows done, rows in all).
        backend: what does the work (`persona_nnsight.backends`); None does it here.

    Raises:
        PersonaError: bad input, or a value that is not finite.
        Interrupted: Ctrl-C; holds the finished rows.
    """
    plan = plan_substitute(
        model,
        grid,
        layers=layers,
        positions=positions,
        conditions=conditions,
        window=window,
        generate=generate,
        seed=seed,
    )
    result = execute(model, grid, plan, progress, backend)
    assert isinstance(result, EditResult)
    return result


def _conditions(conditions: str | Iterable[str] | None, grid: Grid) -> list[str]:
    has_donor = len(grid.personas) > 1
    if conditions is None:
        return [name for name in SUBSTITUTE_CONDITIONS if name != "other_x" or has_donor]
    names = conditions.split(",") if isinstance(conditions, str) else conditions
    wanted = list(dict.fromkeys(name.strip() for name in names))
    for name in wanted:
        if name not in SUBSTITUTE_CONDITIONS:
            raise PersonaError(
                f"Condition {name!r} does not exist; use {', '.join(SUBSTITUTE_CONDITIONS)}."
            )
    if not wanted:
        raise PersonaError(f"No condition was named; use {', '.join(SUBSTITUTE_CONDITIONS)}.")
    if "other_x" in wanted and not has_donor:
        raise PersonaError(
            "Condition 'other_x' needs a second persona to take Δ_X from and this grid has one; "
            "use a grid with several, or leave the condition out."
        )
    return [name for name in SUBSTITUTE_CONDITIONS if name in wanted]
