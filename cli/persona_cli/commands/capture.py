"""`persona capture`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from persona_cli import options as o
from persona_cli.console import titled
from persona_cli.numbers import fixed
from persona_cli.running import run_experiment
from persona_nnsight.experiments.capture import Capture

if TYPE_CHECKING:
    from persona_nnsight.experiments.results import CaptureResult


_RATIOS = {
    "cos_xy_sum": "cos(Δ_XY, Δ_X+Δ_Y)",
    "cos_x_y": "cos(Δ_X, Δ_Y)",
    "inter_over_xy": "‖Inter‖/‖Δ_XY‖",
    "inter_over_xy_normed": "after the norm",
}


def capture(
    *,
    model: o.ModelOptions,
    cells: o.CellOptions,
    experiment: Capture,
    where: o.BackendOptions,
    run: o.RunOptions,
) -> None:
    """Record what persona and task do to the residual stream, and how the two effects add up.

    Each cell of the grid runs as four prompts: BB (baseline persona and task), XB (the persona),
    BY (the task) and XY (both). The effects are differences from BB: Δ_X, Δ_Y and Δ_XY. The table
    shows, over cells, cos(Δ_XY, Δ_X+Δ_Y), cos(Δ_X, Δ_Y) and ‖Δ_XY-Δ_X-Δ_Y‖/‖Δ_XY‖,
    the last one also after the norm that the layer's input goes through.

    Writes residuals.safetensors (h_BB, h_XB, h_BY, h_XY: cells × positions × layers × d_model),
    geometry.csv and run.json.

    Example: persona capture --grid short --layers all --positions p_last,g1
    """
    grid = cells.choose()
    run_experiment(experiment, grid=grid, model=model, where=where, run=run, show=_table)


def _table(result: CaptureResult) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("position")
    summary = result.summary()
    headings = {name: text for name, text in _RATIOS.items() if name in summary}
    for heading in ("layer", *headings.values(), "cells"):
        table.add_column(heading, justify="right")
    for row in summary.to_dict("records"):
        ratios = (row[name] for name in headings)
        table.add_row(row["position"], str(row["layer"]), *map(fixed, ratios), str(row["n"]))
    return titled("Median over cells", table)
