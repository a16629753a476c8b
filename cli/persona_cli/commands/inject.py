"""`persona inject`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from persona_cli import options as o
from persona_cli.console import titled
from persona_cli.numbers import fixed, percent, span
from persona_cli.running import run_experiment
from persona_nnsight.experiments.inject import Inject

if TYPE_CHECKING:
    from persona_nnsight.experiments.results import EditResult


def inject(
    *,
    model: o.ModelOptions,
    cells: o.CellOptions,
    experiment: Inject,
    where: o.BackendOptions,
    run: o.RunOptions,
) -> None:
    """Try to give a persona to a prompt that does not name it, by writing residuals into it.

    The host is BY, the prompt without the persona. At its last token all of --layers are written
    in one run, each layer with its own vector: `oracle` writes h_XY, the residual of the prompt
    that does name the persona; `cached` writes h_BB + Δ_X + Δ_Y; `host` writes nothing. Each is
    scored against the clean continuation of XY, KL(clean ‖ host run) in nats. `gap closed` is
    1 - KL / KL of the host, in each cell: how much of the way to the persona the injection goes.
    The table shows its median over cells, which is not the ratio of the medians.

    Writes kl.csv (one row per cell and edit), summary.csv, contrasts.csv, geometry.csv, run.json,
    and with --generate text.jsonl, and markers.csv if the grid has markers.

    Example: persona inject --grid long --layers '14; 10-18:2'
    """
    grid = cells.choose()
    run_experiment(experiment, grid=grid, model=model, where=where, run=run, show=_table)


def _table(result: EditResult) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("written")
    table.add_column("layers")
    for heading in ("median", "95 %", "gap closed", "95 %", "cells"):
        table.add_column(heading, justify="right")
    for row in result.summary().to_dict("records"):
        table.add_row(
            row["condition"],
            row["layers"],
            fixed(row["median"]),
            span(row["median_lo"], row["median_hi"], digits=3),
            percent(row["gap_closed"]),
            span(100 * row["gap_closed_lo"], 100 * row["gap_closed_hi"], digits=0),
            str(row["n"]),
        )
    return titled("KL to the clean XY continuation over cells, in nats", table)
