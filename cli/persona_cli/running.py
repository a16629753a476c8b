"""What the experiments' commands do around their experiment: load, plan, run, save, show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from persona_cli.console import note_step, notes, output, show_json, spinner
from persona_cli.options import BackendOptions, ModelOptions, RunOptions
from persona_cli.pending import (
    check_model_options,
    check_target,
    is_pending,
    make_backend,
    note_pending,
)
from persona_cli.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.backends.interface import Backend
    from persona_nnsight.experiments.results import Result
    from persona_nnsight.models.loading import Model
    from persona_nnsight.plan.plan import Plan
    from persona_nnsight.prompts.grids import Grid

P = TypeVar("P")


@dataclass(frozen=True)
class Ready(Generic[P]):
    """A loaded model, what to run on it and where, and the directory that the run goes to.

    `backend` makes what does the work, given what to tell of its progress in words.
    """

    model: Model
    plan: P
    out: Path
    backend: Callable[[Callable[[str], None]], Backend]


def prepare(
    model: ModelOptions,
    where: BackendOptions,
    run: RunOptions,
    *,
    make_plan: Callable[[Model], P],
    studies: Callable[[P], list[tuple[Grid, Plan]]],
    show_plan: Callable[[Model, P], None],
    name: Callable[[P], str],
) -> Ready[P] | None:
    """Load a model and plan a run on it; None for a dry run, which ends here.

    Everything that can be refused is refused before weights are downloaded or loaded.

    Args:
        model, where, run: the options.
        make_plan: the plan for a model without weights.
        studies: the grids and plans in it.
        show_plan: prints it, for a dry run and with --verbose.
        name: what the default directory is called, such as ``inject-{model}-short``, for a plan.
    """
    from persona_nnsight.storage.run_directory import default_directory

    check_model_options(model, where)
    asked_out = where.resume or run.out
    if asked_out is not None:
        check_target(asked_out, where)
    _quiet_libraries(run.verbose)

    from persona_nnsight.models.loading import load_model

    with spinner("Loading the model") as stop:

        def notify(step: str) -> None:
            stop()  # downloads show progress bars of their own
            note_step(step)

        arguments = model.arguments()
        skeleton = load_model(**arguments, weights=False, fetch=not run.dry_run, notify=notify)
        plan = make_plan(skeleton)
        if run.dry_run or run.verbose:
            stop()
            show_plan(skeleton, plan)
        if run.dry_run:
            return None
        out = asked_out or default_directory(name(plan).format(model=skeleton.weights.slug))
        check_target(out, where)
        remote = where.name == "ndif"  # then the server has the weights
        loaded = skeleton if remote else load_model(**arguments, notify=notify)

    def backend(notify: Callable[[str], None]) -> Backend:
        return make_backend(loaded, where, model.dtype, out, studies(plan), notify)

    return Ready(loaded, plan, out, backend)


def run_experiment(
    *,
    grid: Grid,
    model: ModelOptions,
    where: BackendOptions,
    run: RunOptions,
    make_plan: Callable[[Model], Plan],
    show: Callable[[Result], RenderableType],
    plan_beside: Callable[[Model], Plan] | None = None,
    save_beside: Callable[[Result], Path] | None = None,
) -> None:
    """Run one experiment from options to files, or with --dry-run print its plan.

    Args:
        grid: the cells.
        model, where, run: the options.
        make_plan: the experiment's plan for a model without weights.
        show: the result for the terminal.
        plan_beside: another plan for the same pass.
        save_beside: what to do with its result; returns the file written.
    """
    from persona_nnsight.backends.interface import Detached
    from persona_nnsight.experiments.execution import Interrupted, execute_together

    makers = [make_plan] if plan_beside is None else [make_plan, plan_beside]

    def show_plan(skeleton: Model, plans: Sequence[Plan]) -> None:
        show_costs(skeleton, grid, plans[0], model, where, run)

    ready = prepare(
        model,
        where,
        run,
        make_plan=lambda skeleton: [make(skeleton) for make in makers],
        studies=lambda plans: [(grid, plan) for plan in plans],
        show_plan=show_plan,
        name=lambda plans: f"{plans[0].command}-{{model}}-{grid.name}",
    )
    if ready is None:
        return
    interrupted = False
    with ExitStack() as held:
        try:
            with progress_bar(ready.plan[0].command) as (progress, say):
                backend = held.enter_context(closing(ready.backend(say)))
                studies = [(grid, plan) for plan in ready.plan]
                results = execute_together(ready.model, studies, progress, backend)
        except Detached:
            note_pending(ready.out, as_json=run.as_json)
        except Interrupted as stopped:
            held.close()
            if is_pending(ready.out):
                note_pending(ready.out, as_json=run.as_json, interrupted=True)
            interrupted = True
            if 0 not in stopped.results:
                note_nothing_finished()
            results = [stopped.results[0]]
        # The run last: with it goes what a server's run could be gone on with.
        more = [save_beside(beside) for beside in results[1:] if save_beside is not None]
        result = results[0]
        result.save(ready.out, finishes=True)
    if run.as_json:
        show_json(_summary(result, ready.out))
    else:
        output().print(show(result))
        show_findings(result)
        show_files(ready.out)
        for path in more:
            output().print(str(path), soft_wrap=True)
    if run.verbose:
        first, total = result.seconds["first_cells_recorded"], result.seconds["total"]
        notes.print(f"first cells recorded after {first:.1f} s, all done after {total:.1f} s")
    if interrupted:
        note_interruption()


def note_nothing_finished() -> NoReturn:
    """Say that there is nothing to keep, and leave."""
    notes.print("Interrupted before anything was finished; nothing was written.")
    raise typer.Exit(130) from None


def note_interruption() -> None:
    """Say that a run is not whole, and leave."""
    notes.print("Interrupted: the tables hold what was finished, and run.json says so.")
    raise typer.Exit(130)


def _quiet_libraries(verbose: bool) -> None:
    """Keep transformers' own progress bars and advice off the terminal."""
    if verbose:
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def show_costs(
    model: Model,
    grid: Grid,
    plan: Plan,
    options: ModelOptions,
    where: BackendOptions,
    run: RunOptions,
) -> None:
    """Print what a plan will do: the result of a dry run, a note otherwise."""
    from persona_nnsight.models.weights.model_files import human_size
    from persona_nnsight.plan.costs import estimate

    if run.as_json and run.dry_run:
        summary = {"command": plan.command, **cost_summary(model, plan, grid, options, where)}
        show_json(summary)
        return
    limits = make_backend(model, where, options.dtype).limits(plan)
    cost = estimate(plan, model, limits)
    dtype = str(model.dtype).removeprefix("torch.")
    memory = (
        f"{human_size(cost.weight_bytes)} of weights, about {human_size(cost.working_bytes)} "
        "beside them"
    )
    remote = where.name == "ndif"
    place = "on the server, as it has it" if remote else f"{dtype} on {model.device}"
    jobs = math.ceil(cost.cells / limits.cells)
    rows = {
        "model": f"{model.weights.model_id}, {place}",
        "grid": f"{grid.name}, {cost.cells} cells",
        "layers": ", ".join(map(str, plan.layers)) + f" of {model.tree.n_layers}",
        "positions": ", ".join(plan.positions),
        "rows": f"{plan.n_results}: {cost.cells} cells recorded, the rest KLs and texts",
        "unique prompts": f"{cost.unique_prompts}, {cost.prompt_tokens} tokens",
        "tokens": f"{cost.token_forwards} through the model",
        **(
            {"jobs": f"{jobs}, up to {limits.cells} cells each"}
            if remote
            else {
                "forward passes": f"{cost.forward_passes}, up to {limits.rows} rows each",
                "memory": memory,
            }
        ),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    for name, value in rows.items():
        table.add_row(name, value)
    (output() if run.dry_run else notes).print(table)


def cost_summary(
    model: Model, plan: Plan, grid: Grid, options: ModelOptions, where: BackendOptions
) -> dict[str, Any]:
    """What ``--dry-run --json`` says of a plan."""
    from persona_nnsight.plan.costs import estimate

    limits = make_backend(model, where, options.dtype).limits(plan)
    return {
        "model": model.weights.model_id,
        "grid": grid.name,
        "layers": plan.layers,
        "positions": plan.positions,
        "window": plan.window,
        "cells": [[cell.persona, cell.task] for cell in plan.cells],
        "cost": estimate(plan, model, limits).to_dict(),
    }


def _summary(result: Result, directory: Path) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "command": result.plan.command,
        "model": result.model.weights.model_id,
        "grid": result.grid.name,
        "complete": result.complete,
        "out": str(directory),
        "files": sorted(path.name for path in directory.iterdir()),
        "summary": as_records(result.summary()),
        "findings": result.findings(),
        "seconds": round(result.seconds["total"], 3),
    }


def as_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON objects; what is missing is null."""
    records: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return records


def show_findings(result: Result) -> None:
    """Print what the numbers allow one to say."""
    from persona_nnsight.analysis.findings import CAVEAT

    for sentence in result.findings():
        output().print(Text(f"\n{sentence}"))
    output().print(f"\n{CAVEAT}", style="dim")


def show_files(directory: Path) -> None:
    """Print where a run went and what it holds."""
    names = ", ".join(sorted(path.name for path in directory.iterdir()))
    output().print(f"\n{directory}/: {names}", soft_wrap=True)
