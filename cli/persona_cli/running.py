"""What capture, substitute and inject do around their experiment: load, plan, run, save, show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from persona_cli.console import note_step, notes, output, spinner

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.grids import Grid
    from persona_nnsight.models import Model
    from persona_nnsight.plan import Plan
    from persona_nnsight.results import Result


def run_experiment(
    *,
    grid: Grid,
    load: dict[str, Any],
    make_plan: Callable[[Model], Plan],
    show: Callable[[Result], RenderableType],
    out: Path | None,
    as_json: bool,
    dry_run: bool,
    verbose: bool,
) -> None:
    """Run one experiment from options to files, or with `dry_run` print its plan.

    Everything that can be refused is refused before weights are downloaded or loaded.

    Args:
        grid: the cells.
        load: arguments of `persona_nnsight.load_model`.
        make_plan: the experiment's plan for a model without weights.
        show: the result for the terminal.
        out: the run directory, or None for the default.
        as_json: standard output holds one JSON object and nothing else.
        dry_run: plan only.
        verbose: show the plan, the timings and the libraries' messages.
    """
    from persona_nnsight.runs import check_free, default_directory

    if out is not None:
        check_free(out)
    _quiet_libraries(verbose)

    from persona_nnsight.experiments import Interrupted, execute
    from persona_nnsight.models import load_model

    with spinner("Loading the model") as stop:

        def notify(step: str) -> None:
            stop()  # downloads show progress bars of their own
            note_step(step)

        skeleton = load_model(**load, weights=False, fetch=not dry_run, notify=notify)
        plan = make_plan(skeleton)
        if dry_run or verbose:
            stop()
            _show_plan(skeleton, grid, plan, as_json=as_json, on_stdout=dry_run)
        if dry_run:
            return
        if out is None:
            out = default_directory(plan.command, skeleton.weights.slug, grid.name)
            check_free(out)
        model = load_model(**load, notify=notify)
    interrupted = False
    try:
        with _progress_bar(plan.command) as progress:
            result = execute(model, grid, plan, progress)
    except Interrupted as stopped:
        interrupted = True
        if stopped.result is None:
            notes.print("Interrupted before anything was finished; nothing was written.")
            raise typer.Exit(130) from None
        result = stopped.result
    result.save(out)
    if as_json:
        print(json.dumps(_summary(result, out), indent=1, ensure_ascii=False))
    else:
        output().print(show(result))
        _show_files(out)
    if verbose:
        first, total = result.seconds["first_cells_recorded"], result.seconds["total"]
        notes.print(f"first cells recorded after {first:.1f} s, all done after {total:.1f} s")
    if interrupted:
        notes.print("Interrupted: the tables hold what was finished, and run.json says so.")
        raise typer.Exit(130)


def _quiet_libraries(verbose: bool) -> None:
    """Keep transformers' own progress bars and advice off the terminal."""
    if verbose:
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def _progress_bar(command: str) -> Iterator[Callable[[int, int], None]]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows, about"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=notes,
        transient=True,
    )
    with bar:
        task = bar.add_task(command, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show_plan(model: Model, grid: Grid, plan: Plan, *, as_json: bool, on_stdout: bool) -> None:
    from persona_nnsight.costs import estimate, fit_limits
    from persona_nnsight.weights.model_files import human_size

    limits = fit_limits(plan, model)
    cost = estimate(plan, model, limits)
    if as_json and on_stdout:
        summary = {
            "command": plan.command,
            "model": model.weights.model_id,
            "grid": grid.name,
            "layers": plan.layers,
            "positions": plan.positions,
            "window": plan.window,
            "cells": [[cell.persona, cell.task] for cell in plan.cells],
            "cost": cost.to_dict(),
        }
        print(json.dumps(summary, indent=1, ensure_ascii=False))
        return
    dtype = str(model.dtype).removeprefix("torch.")
    rows = {
        "model": f"{model.weights.model_id}, {dtype} on {model.device}",
        "grid": f"{grid.name}, {cost.cells} cells",
        "layers": ", ".join(map(str, plan.layers)) + f" of {model.tree.n_layers}",
        "positions": ", ".join(plan.positions),
        "edits": f"{cost.edits} per cell, {cost.edits * cost.cells} rows",
        "unique prompts": f"{cost.unique_prompts}, {cost.prompt_tokens} tokens",
        "tokens": f"{cost.token_forwards} through the model",
        "forward passes": f"{cost.forward_passes}, up to {limits.rows} rows each",
        "memory": f"{human_size(cost.weight_bytes)} of weights, "
        f"about {human_size(cost.working_bytes)} beside them",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    for name, value in rows.items():
        table.add_row(name, value)
    (output() if on_stdout else notes).print(table)


def _summary(result: Result, directory: Path) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "command": result.plan.command,
        "model": result.model.weights.model_id,
        "grid": result.grid.name,
        "complete": result.complete,
        "out": str(directory),
        "files": sorted(path.name for path in directory.iterdir()),
        "summary": _records(result.summary()),
        "seconds": round(result.seconds["total"], 3),
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON objects; what is missing is null."""
    records: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return records


def _show_files(directory: Path) -> None:
    names = ", ".join(sorted(path.name for path in directory.iterdir()))
    output().print(f"\n{directory}/: {names}", markup=False, soft_wrap=True)


def percent(value: float) -> str:
    """A share for the terminal: ``89 %``, or a dash where there is none."""
    return f"{round(100 * value)} %" if math.isfinite(value) else "-"


def fixed(value: float) -> str:
    """A number for the terminal, to three decimals; a dash where there is none."""
    return f"{round(value, 3) + 0.0:.3f}" if math.isfinite(value) else "-"
