"""`persona steer`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from persona_cli import options as o
from persona_cli.console import titled
from persona_cli.numbers import fixed, percent, span
from persona_cli.running import run_experiment
from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.arguments import STEERING
from persona_nnsight.experiments.steer import Steer

if TYPE_CHECKING:
    from persona_nnsight.experiments.results import EditResult


def steer(
    *,
    model: o.ModelOptions,
    cells: o.CellOptions,
    experiment: Steer,
    save_vectors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save Δ_X and Δ_Y of this run (.safetensors); see `persona vectors`.",
            show_default=False,
            rich_help_panel=STEERING,
        ),
    ] = None,
    where: o.BackendOptions,
    run: o.RunOptions,
) -> None:
    """Write the persona's and the task's effects in other proportions, and see what that does.

    h_BB + α·Δ_X + β·Δ_Y is written at all of --layers and --positions in one run, each site with
    its own vector, for every pair of --alpha and --beta. α = β = 1 is the additive vector,
    α = 0, β = 1 the task without the persona. KL is from the clean XY run, in nats. With --host xy
    the control is `bb` (α = β = 0) and `recovered` is the share of its KL that is avoided; with
    --host by it is the unedited host, and `gap closed` how far the writing goes towards the prompt
    with the persona. With --generate, text is written, and markers are counted if the grid has any.

    --save-vectors keeps the effects at the prompt positions; --vectors applies them later, to other
    tasks. With --host by that is the paper's cached case: a persona from a file, in a prompt that
    does not name it.

    Writes kl.csv, summary.csv, contrasts.csv, geometry.csv (not with --vectors), run.json, and
    with --generate text.jsonl and markers.csv.

    Example: persona steer --alpha 0:3:0.5 --layers 16 --generate 30 --save-vectors v.safetensors
    """
    from persona_nnsight.experiments.capture import Capture
    from persona_nnsight.method.sites import parse_positions
    from persona_nnsight.storage.files import check_new
    from persona_nnsight.storage.vectors import PROMPT_POSITIONS, Vectors

    if experiment.vectors is not None and save_vectors is not None:
        raise PersonaError("--vectors and --save-vectors together would copy a file; use one.")
    grid = cells.choose()
    if isinstance(experiment.vectors, Path):  # refused before a model is loaded
        experiment = replace(experiment, vectors=Vectors.load(experiment.vectors))
    keep = [name for name in parse_positions(experiment.positions) if name in PROMPT_POSITIONS]
    if save_vectors is not None and where.resume is None:
        check_new(save_vectors)
        if not keep:
            raise PersonaError(
                f"--save-vectors needs {' or '.join(PROMPT_POSITIONS)} among --positions; at "
                "generated tokens the effects belong to one continuation."
            )
    captured = Capture(layers=experiment.layers, positions=keep, window=1)
    run_experiment(
        experiment,
        grid=grid,
        model=model,
        where=where,
        run=run,
        show=_table,
        beside=None
        if save_vectors is None
        else (captured, lambda result: result.vectors().save(save_vectors)),
    )


def _table(result: EditResult) -> RenderableType:
    summary = result.summary()
    share = "gap_closed" if "gap_closed" in summary else "recovered"
    markers = result.marker_summary()
    table = Table(box=None, pad_edge=False)
    for heading in ("written", "α", "β"):
        table.add_column(heading, justify="left" if heading == "written" else "right")
    for heading in ("median KL", "95 %", share.replace("_", " "), "cells"):
        table.add_column(heading, justify="right")
    if markers is not None:
        table.add_column("texts with marker", justify="right")
        found = {
            (row["condition"], row["alpha"], row["beta"]): row["any"]
            for row in markers.fillna(0).to_dict("records")
        }
    for row in summary.to_dict("records"):
        steers = row["condition"] == "steer"
        cells = [
            row["condition"],
            *(f"{row[name]:g}" if steers else "" for name in ("alpha", "beta")),
            fixed(row["median"]),
            span(row["median_lo"], row["median_hi"], digits=3),
            percent(row[share]),
            str(row["n"]),
        ]
        if markers is not None:
            key = (row["condition"], *((row["alpha"], row["beta"]) if steers else (0, 0)))
            cells.append(str(found.get(key, "")))
        table.add_row(*cells)
    written = next(edit for edit in result.plan.edits if edit.name == "steer")
    sites = "layer {layers}, {position}".format_map(written.columns)
    return titled(f"KL to the clean XY run over cells, in nats; written at {sites}", table)
