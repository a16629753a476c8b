"""`persona capture`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from persona_cli import options as o
from persona_cli.console import titled
from persona_cli.numbers import fixed
from persona_cli.running import run_experiment
from persona_nnsight.analysis.columns import COLUMN
from persona_nnsight.experiments.capture import Capture

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.experiments.results import CaptureResult


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
    shows, over cells, cos(Δ_XY, Δ_X+Δ_Y), cos(Δ_X, Δ_Y) and ‖Inter‖/‖Δ_XY‖, where Inter is
    Δ_XY-Δ_X-Δ_Y, the last one also after the norm that the layer's input goes through. Beside
    them stand the same with Δ_Y alone, with Δ_X alone and, as Δ_X′+Δ_Y, with another persona's
    effect: adding Δ_X is worth what it gains over these.

    Writes residuals.safetensors (h_BB, h_XB, h_BY, h_XY: cells × positions × layers × d_model),
    geometry.csv and run.json.

    Example: persona capture --grid short --layers all --positions p_last,g1
    """
    grid = cells.choose()
    run_experiment(experiment, grid=grid, model=model, where=where, run=run, show=_table)


def _table(result: CaptureResult) -> RenderableType:
    from persona_nnsight.analysis.geometry_tables import COSINES, RESTS

    # Side by side all of them would be wider than a terminal.
    return Group(
        titled("Median over cells: cosines", _measures(result.summary(), COSINES)),
        "",
        titled("Median over cells: what is left", _measures(result.summary(), RESTS)),
    )


def _measures(summary: pd.DataFrame, names: Sequence[str]) -> Table:
    """One row per site: those of the measures that the summary has."""
    table = Table(box=None, pad_edge=False)
    table.add_column("position")
    present = [name for name in names if name in summary]
    for heading in ("layer", *(COLUMN[name].heading for name in present), "cells"):
        table.add_column(heading, justify="right")
    for row in summary.to_dict("records"):
        ratios = (row[name] for name in present)
        table.add_row(row["position"], str(row["layer"]), *map(fixed, ratios), str(row["n"]))
    return table
