"""What is run: one plan per row of the table, and the part of it that the procedure is timed on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from persona_nnsight import Grid, Model
from persona_nnsight.experiments.capture import Capture
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.method.sites import format_layers
from persona_nnsight.plan.plan import Plan
from persona_nnsight.prompts.encoding import encode_prompt
from persona_nnsight.reproduction.protocol import layer_sets, plan_table

#: Layers 8, 15 and 21 of 30, and as deep in other models.
_THREE_LAYERS = "27%,50%,70%"


@dataclass(frozen=True)
class Workload:
    """A row: a plan, and the grid that it was made of."""

    name: str
    grid: Grid
    plan: Plan


@dataclass(frozen=True)
class Grids:
    """The short grid and the long one; some rows take the review cells of the long one."""

    short: Grid
    long: Grid


def _as_published(name: str, grid: Grid, plan: Plan) -> Workload:
    """Without what the paper did not run: the floor of rounding."""
    floors = ("clean", "rounded")
    edits = tuple(edit for edit in plan.edits if edit.name not in floors or not edit.scored)
    return Workload(name, grid, replace(plan, edits=edits))


def _short(model: Model, grids: Grids) -> Workload:
    prompt = encode_prompt(model.tokenizer, grids.short.prompt(None, None))
    first = "" if prompt.user_last is None else "p_user_last,"
    plan = Substitute(positions=f"{first}p_last,g1,g2", conditions="additive").plan(
        model, grids.short
    )
    return _as_published("short grid, 5 layers", grids.short, plan)


def _three_layers(model: Model, grids: Grids) -> Workload:
    plan = Substitute(layers=_THREE_LAYERS, conditions="additive").plan(model, grids.long)
    return _as_published("long grid, 3 layers", grids.long, plan)


def _all_layers(model: Model, grids: Grids) -> Workload:
    plan = Substitute(layers="all", conditions="additive").plan(model, grids.long)
    return _as_published("long grid, all layers", grids.long, plan)


def _inject(model: Model, grids: Grids) -> Workload:
    """What the paper ran: the oracle at the one layer, the cached vector at every set."""
    study = plan_table("table4", model, grids.short, grids.long)
    alone = format_layers(layer_sets(model.tree.n_layers)[0])
    edits = tuple(
        edit
        for edit in study.plan.edits
        if edit.name != "oracle" or edit.columns["layers"] == alone
    )
    plan = replace(study.plan, edits=edits)
    return _as_published("inject, 5 layer sets", study.grid, plan)


def _markers(model: Model, grids: Grids) -> Workload:
    study = plan_table("table3", model, grids.short, grids.long)
    return Workload("markers, 80 tokens", study.grid, study.plan)


def _capture(model: Model, grids: Grids) -> Workload:
    return Workload(
        "capture, all layers", grids.long, Capture(layers="all").plan(model, grids.long)
    )


#: The rows by the name they are asked for with.
ROWS: dict[str, Callable[[Model, Grids], Workload]] = {
    "short": _short,
    "long": _three_layers,
    "long-all": _all_layers,
    "inject": _inject,
    "markers": _markers,
    "capture": _capture,
}


@dataclass(frozen=True)
class Subset:
    """Numbers of the cells and edits that the published procedure is run on."""

    cells: tuple[int, ...]
    edits: tuple[int, ...]


def subset_of(plan: Plan, cells: int, edits: int) -> Subset:
    """Up to so many cells and edits, spread over the plan; an injection's edits stay together.

    The edits of a substitution are alike but for their site, so a few of them will do; those of
    other plans are few, and not alike.
    """
    tasks = len({cell.task for cell in plan.cells})
    chosen = range(len(plan.edits))
    if plan.command == "substitute":
        return Subset(
            spread(len(plan.cells), cells, tasks), spread(len(chosen), edits, len(plan.layers))
        )
    return Subset(spread(len(plan.cells), cells, tasks), tuple(chosen))


def spread(total: int, wanted: int, inner: int) -> tuple[int, ...]:
    """Every k-th of `total` things, round the end where need be, until there are `wanted`.

    They stand in rows of `inner`; k has no divisor in common with that, so that rows and places
    within a row both vary.
    """
    wanted = min(wanted, total)
    if not wanted:
        return ()
    step = math.ceil(total / wanted)
    while math.gcd(step, total * inner) > 1:
        step += 1
    return tuple(sorted(i * step % total for i in range(wanted)))
