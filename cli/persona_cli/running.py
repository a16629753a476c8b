"""What the experiments' commands do around their experiment: load, plan, run, save, show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

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
    from persona_nnsight.experiments.execution import Study
    from persona_nnsight.experiments.experiment import Experiment, Progress
    from persona_nnsight.experiments.results import Result
    from persona_nnsight.models.loading import Model
    from persona_nnsight.plan.plan import Plan
    from persona_nnsight.prompts.grids import Grid

S = TypeVar("S", bound="Study[Any]")
R = TypeVar("R", bound="Result")
T = TypeVar("T")


@dataclass(frozen=True)
class Ready(Generic[S]):
    """A loaded model, what to run on it and where, and the directory that the run goes to.

    `backend` makes what does the work, given what to tell of its progress in words.
    """

    model: Model
    studies: list[S]
    out: Path
    backend: Callable[[Callable[[str], None]], Backend]


def prepare(
    model: ModelOptions,
    where: BackendOptions,
    run: RunOptions,
    *,
    plan: Callable[[Model], list[S]],
    show_plan: Callable[[Model, list[S]], None],
    name: str,
) -> Ready[S] | None:
    """Load a model and plan a run on it; None for a dry run, which ends here.

    Everything that can be refused is refused before weights are downloaded or loaded.

    Args:
        model, where, run: the options.
        plan: what is to be done on a model without weights.
        show_plan: prints it, for a dry run and with --verbose.
        name: what the default directory is called, such as ``inject-{model}-short``.
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
        skeleton = load_model(
            **arguments, weights=False, fetch=not run.dry_run, needs_template=True, notify=notify
        )
        studies = plan(skeleton)
        if run.dry_run or run.verbose:
            stop()
            show_plan(skeleton, studies)
        if run.dry_run:
            return None
        out = asked_out or default_directory(name.format(model=skeleton.weights.slug))
        check_target(out, where)
        remote = where.name == "ndif"  # then the server has the weights
        loaded = skeleton if remote else load_model(**arguments, notify=notify)

    def backend(notify: Callable[[str], None]) -> Backend:
        return make_backend(loaded, where, model.dtype, out, studies, notify)

    return Ready(loaded, studies, out, backend)


def carried_out(
    ready: Ready[Any],
    run: RunOptions,
    name: str,
    *,
    work: Callable[[Progress, Backend], T],
    left: Callable[[KeyboardInterrupt], T | None],
    save: Callable[[T], object],
) -> tuple[T, bool]:
    """Do the work and save what came of it, and whether it was interrupted.

    A run that goes on elsewhere, or that was interrupted and can be gone on with, ends here.

    Args:
        ready: from `prepare`.
        run: the options.
        name: of the command.
        work: does it.
        left: what an interruption left that can be saved; None for nothing.
        save: writes it.
    """
    from persona_nnsight.backends.interface import Detached

    interrupted = False
    with ExitStack() as held:
        try:
            with progress_bar(name) as (progress, say):
                made = work(progress, held.enter_context(closing(ready.backend(say))))
        except Detached:
            note_pending(ready.out, as_json=run.as_json)
        except KeyboardInterrupt as stopped:
            held.close()
            if is_pending(ready.out):
                note_pending(ready.out, as_json=run.as_json, interrupted=True)
            found, interrupted = left(stopped), True
            if found is None:
                notes.print("Interrupted before anything was finished; nothing was written.")
                raise typer.Exit(130) from None
            made = found
        save(made)
    return made, interrupted


def run_experiment(
    experiment: Experiment[R],
    *,
    grid: Grid,
    model: ModelOptions,
    where: BackendOptions,
    run: RunOptions,
    show: Callable[[R], RenderableType],
    beside: tuple[Experiment[Any], Callable[[Any], Path]] | None = None,
) -> None:
    """Run one experiment from options to files, or with --dry-run print its plan.

    Args:
        experiment: with its arguments.
        grid: the cells.
        model, where, run: the options.
        show: the result for the terminal.
        beside: another experiment for the same pass, and what saves its result and returns the
            file written.
    """
    from persona_nnsight.experiments.execution import Interrupted, Study, execute_together

    def planned(skeleton: Model) -> list[Study[Any]]:
        first: Study[Any] = Study(experiment, grid, experiment.plan(skeleton, grid))
        if beside is None:
            return [first]
        # On the same day, also where the day ends in between.
        other = replace(beside[0], date=first.plan.rendering.date)
        return [first, Study(other, grid, other.plan(skeleton, grid))]

    ready = prepare(
        model,
        where,
        run,
        plan=planned,
        show_plan=lambda skeleton, studies: show_costs(
            skeleton, grid, studies[0].plan, model, where, run
        ),
        name=f"{experiment.name}-{{model}}-{grid.name}",
    )
    if ready is None:
        return
    more: list[Path] = []

    def left(stopped: KeyboardInterrupt) -> list[Any] | None:
        if isinstance(stopped, Interrupted) and 0 in stopped.results:
            return [stopped.results[0]]
        return None

    def save(results: list[Any]) -> None:
        # The run last: with it goes what a server's run could be gone on with.
        more.extend(beside[1](result) for result in results[1:] if beside)
        results[0].save(ready.out, finishes=True)

    results, interrupted = carried_out(
        ready,
        run,
        experiment.name,
        work=lambda progress, backend: execute_together(
            ready.model, ready.studies, progress, backend
        ),
        left=left,
        save=save,
    )
    result: R = results[0]
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


#: What a dry run says of a dtype of few bits.
_ROUNDING = "shows in KLs in this dtype: compare with condition rounded, or use --dtype float32"


#: How rows run, in words.
_PATHS = {"fast": "shared openings, padded batches", "whole": "whole rows, unpadded"}


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
        **({"date": f"{day}, in every prompt"} if (day := plan.rendering.date) else {}),
        "layers": ", ".join(map(str, plan.layers)) + f" of {model.tree.n_layers}",
        "positions": ", ".join(plan.positions),
        "rows": f"{plan.n_results}: {cost.cells} cells recorded, the rest KLs and texts",
        "unique prompts": f"{cost.unique_prompts}, {cost.prompt_tokens} tokens",
        "tokens": f"{cost.token_forwards} through the model",
        "path": f"{_PATHS[limits.path.name]} ({limits.path.why})",
        **({"rounding": _ROUNDING} if model.rounds else {}),
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
    from persona_nnsight.storage.manifest import rendering_record

    limits = make_backend(model, where, options.dtype).limits(plan)
    return {
        "model": model.weights.model_id,
        "grid": grid.name,
        **rendering_record(plan),
        "layers": plan.layers,
        "positions": plan.positions,
        "window": plan.window,
        "cells": [[cell.persona, cell.task] for cell in plan.cells],
        "path": limits.path.to_data(),
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
    from persona_nnsight.analysis.wording import caveat

    for sentence in result.findings():
        output().print(Text(f"\n{sentence}"))
    output().print(f"\n{caveat(result.tables)}", style="dim")


def show_files(directory: Path) -> None:
    """Print where a run went and what it holds."""
    names = ", ".join(sorted(path.name for path in directory.iterdir()))
    output().print(f"\n{directory}/: {names}", soft_wrap=True)
