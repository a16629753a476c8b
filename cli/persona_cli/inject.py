"""`persona inject`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from persona_cli import options as o
from persona_cli.console import titled
from persona_cli.running import fixed, percent, run_experiment
from persona_nnsight.sites import DEFAULT_LAYERS

if TYPE_CHECKING:
    from persona_nnsight.results import Result


def inject(
    model: o.ModelSpec = o.DEFAULT_MODEL,
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    attn: o.Attention = None,
    grid: o.GridSource = None,
    personas: o.Personas = None,
    tasks: o.Tasks = None,
    persona: o.PersonaText = None,
    task: o.TaskText = None,
    layers: o.Layers = DEFAULT_LAYERS,
    each: Annotated[
        bool,
        typer.Option(
            "--each", help="Also write every layer alone.", rich_help_panel="Sites and measure"
        ),
    ] = False,
    window: o.Window = 10,
    generate: o.Generate = 0,
    out: o.Out = None,
    as_json: o.Json = False,
    dry_run: o.DryRun = False,
    verbose: o.Verbose = False,
) -> None:
    """Try to give a persona to a prompt that does not name it, by writing residuals into it.

    The host is BY, the prompt without the persona. At its last token all of --layers are written
    in one run, each layer with its own vector: `oracle` writes h_XY, the residual of the prompt
    that does name the persona; `cached` writes h_BB + Δ_X + Δ_Y; `host` writes nothing. Each is
    scored against the clean continuation of XY, KL(clean ‖ host run) in nats. `gap closed` is
    1 - KL / KL of the host, in each cell: how much of the way to the persona the injection goes.
    The table shows its median over cells, which is not the ratio of the medians.

    Writes kl.csv (one row per cell and edit), summary.csv, run.json, and text.jsonl with
    --generate.

    Example: persona inject --grid long --layers 10-18:2 --each
    """
    from persona_nnsight import experiments

    cells = o.choose_grid(grid, personas, tasks, persona, task)
    run_experiment(
        grid=cells,
        load={
            "spec": model,
            "revision": revision,
            "dtype": dtype,
            "device": device,
            "attn": attn,
        },
        make_plan=lambda skeleton: experiments.plan_inject(
            skeleton,
            cells,
            layers=layers,
            each=each,
            window=window,
            generate=generate,
        ),
        show=_table,
        out=out,
        as_json=as_json,
        dry_run=dry_run,
        verbose=verbose,
    )


def _table(result: Result) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("written")
    table.add_column("layers")
    for heading in ("median", "q25", "q75", "gap closed", "cells"):
        table.add_column(heading, justify="right")
    for row in result.summary().to_dict("records"):
        quartiles = map(fixed, (row["median"], row["q25"], row["q75"]))
        closed, cells = percent(row["gap_closed"]), str(row["n"])
        table.add_row(row["condition"], row["layers"], *quartiles, closed, cells)
    return titled("KL to the clean XY continuation over cells, in nats", table)
