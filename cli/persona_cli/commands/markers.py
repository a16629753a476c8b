"""`persona markers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from persona_cli import options as o
from persona_cli.console import titled
from persona_cli.numbers import span
from persona_cli.running import run_experiment
from persona_nnsight.experiments.markers import Markers

if TYPE_CHECKING:
    from persona_nnsight.experiments.results import MarkersResult


def markers(
    *,
    model: o.ModelOptions,
    cells: o.LongCellOptions,
    experiment: Markers,
    where: o.BackendOptions,
    run: o.RunOptions,
) -> None:
    """Generate text with and without the persona's effect, and look for the persona in it.

    Greedy text in every cell: `clean` is the XY prompt as it is; `additive` writes
    h_BB + Δ_X + Δ_Y and `remove_x` writes h_XY - Δ_X at the last prompt token, at each of --layers
    in a run of its own; `bare` is the task alone as the user message. A text shows its persona when
    one of the persona's markers, words that the grid lists for it, occurs in it.

    Writes text.jsonl (the texts), markers.csv (one row per text), summary.csv, contrasts.csv
    (paired differences between conditions), geometry.csv and run.json.

    Example: persona markers --grid long --tasks arch --tokens 40
    """
    grid = cells.choose(default="long")
    run_experiment(experiment, grid=grid, model=model, where=where, run=run, show=_table)


def _table(result: MarkersResult) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("text under")
    table.add_column("layer")
    for heading in ("any marker", "95 %", "distinct", "95 %", "texts"):
        table.add_column(heading, justify="right")
    for row in result.summary().to_dict("records"):
        table.add_row(
            row["condition"],
            row["layers"],
            str(row["any"]),
            span(row["any_lo"], row["any_hi"], digits=0),
            f"{row['distinct']:.2f}",
            span(row["distinct_lo"], row["distinct_hi"], digits=2),
            str(row["n"]),
        )
    return titled("Texts with a marker of their persona, and distinct markers in a text", table)
