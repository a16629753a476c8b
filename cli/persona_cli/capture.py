"""`persona capture`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from persona_cli import options as o
from persona_cli.console import titled
from persona_cli.running import fixed, run_experiment
from persona_nnsight.sites import DEFAULT_LAYERS, DEFAULT_POSITIONS

if TYPE_CHECKING:
    from persona_nnsight.results import Result


def capture(
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
    positions: o.Positions = DEFAULT_POSITIONS,
    window: o.Window = 10,
    out: o.Out = None,
    as_json: o.Json = False,
    dry_run: o.DryRun = False,
    verbose: o.Verbose = False,
) -> None:
    """Record what persona and task do to the residual stream, and how the two effects add up.

    Each cell of the grid runs as four prompts: BB (baseline persona and task), XB (the persona),
    BY (the task) and XY (both). The effects are differences from BB: Δ_X, Δ_Y and Δ_XY. The table
    shows, over cells, cos(Δ_XY, Δ_X+Δ_Y), cos(Δ_X, Δ_Y) and ‖Δ_XY-Δ_X-Δ_Y‖/‖Δ_XY‖.

    Writes residuals.safetensors (h_BB, h_XB, h_BY, h_XY: cells × positions × layers × d_model),
    geometry.csv and run.json.

    Example: persona capture --grid short --layers all --positions p_last,g1
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
        make_plan=lambda skeleton: experiments.plan_capture(
            skeleton,
            cells,
            layers=layers,
            positions=positions,
            window=window,
        ),
        show=_table,
        out=out,
        as_json=as_json,
        dry_run=dry_run,
        verbose=verbose,
    )


def _table(result: Result) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("position")
    for heading in ("layer", "cos(Δ_XY, Δ_X+Δ_Y)", "cos(Δ_X, Δ_Y)", "‖Inter‖/‖Δ_XY‖", "cells"):
        table.add_column(heading, justify="right")
    for row in result.summary().to_dict("records"):
        ratios = (row[name] for name in ("cos_xy_sum", "cos_x_y", "inter_over_xy"))
        table.add_row(row["position"], str(row["layer"]), *map(fixed, ratios), str(row["n"]))
    return titled("Median over cells", table)
