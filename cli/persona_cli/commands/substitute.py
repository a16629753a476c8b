"""`persona substitute`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table

from persona_cli import options as o
from persona_cli.console import titled
from persona_cli.numbers import fixed, percent, span
from persona_cli.running import run_experiment
from persona_nnsight.experiments.substitute import Substitute

if TYPE_CHECKING:
    from persona_nnsight.experiments.results import EditResult


def substitute(
    *,
    model: o.ModelOptions,
    cells: o.CellOptions,
    experiment: Substitute,
    where: o.BackendOptions,
    run: o.RunOptions,
) -> None:
    """Overwrite one residual of the role prompt's run and measure how the answer changes.

    At every asked site of the XY run, one site at a time, write the additive vector
    h_BB + Δ_X + Δ_Y, and controls beside it. KL(clean ‖ patched) is summed over the window, in
    nats. A small KL alone means little: at an early layer hardly any edit matters. `recovered` is
    the median over cells of 1 - KL / KL of writing h_BB (neither persona nor task): 100 % means
    that nothing is lost, 0 % that the vector does no better than the baseline. `clean` always runs:
    its KL is what rounding makes, and nothing is said of KLs that are not clearly above it.

    Writes kl.csv (one row per cell and edit), summary.csv, contrasts.csv (paired differences from
    the controls), geometry.csv, run.json, and with --generate text.jsonl, and markers.csv if the
    grid has markers.

    Example: persona substitute --grid short --layers 25%,55% --conditions additive,bb,by
    """
    grid = cells.choose()
    run_experiment(experiment, grid=grid, model=model, where=where, run=run, show=_table)


def _table(result: EditResult) -> RenderableType:
    """Conditions against layers, a block per position: median KL, and what of it is recovered."""
    summary = result.summary()
    layers = list(dict.fromkeys(summary["layers"]))
    table = Table(box=None, pad_edge=False)
    table.add_column("position")
    table.add_column("written")
    for layer in layers:
        table.add_column(f"L{layer}", justify="right")
    cells = {
        (row["position"], row["condition"], row["layers"]): row
        for row in summary.to_dict("records")
    }
    # Of a run that was interrupted some are missing.
    absent = dict.fromkeys(("median", "median_lo", "median_hi", "recovered"), math.nan)
    for position in result.plan.positions:
        for condition in dict.fromkeys(summary["condition"]):
            row = [cells.get((position, condition, layer), absent) for layer in layers]
            table.add_row(position, condition, *(_with_share(cell) for cell in row))
            if condition == "additive":
                spans = (span(c["median_lo"], c["median_hi"], digits=3) for c in row)
                table.add_row("", "  95 %", *spans, style="dim")
        table.add_section()
    title = "Median KL over cells, in nats, and the share of bb's that is recovered, by layer"
    return titled(title, table)


def _with_share(cell: Mapping[Any, Any]) -> str:
    """``0.045  89 %``: a median and what it recovers; the median alone where that has no sense."""
    median, share = fixed(cell["median"]), cell["recovered"]
    return f"{median} {percent(share):>5}" if math.isfinite(share) else median
