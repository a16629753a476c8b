"""reproduce: the paper's tables in two passes, one over each grid."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from persona_nnsight.backends.interface import Backend, Detached
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.experiments.execution import Interrupted, execute_together
from persona_nnsight.experiments.experiment import Progress
from persona_nnsight.experiments.results import Result
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.joining import join
from persona_nnsight.plan.plan import Plan
from persona_nnsight.prompts.chat_template import rendering_of
from persona_nnsight.prompts.grids import Grid
from persona_nnsight.prompts.rendering import Day
from persona_nnsight.reproduction.comparison import comparison
from persona_nnsight.reproduction.protocol import PaperTable, parse_targets, plan_table
from persona_nnsight.storage.manifest import reproduction_manifest
from persona_nnsight.storage.run_directory import save_run


@dataclass(frozen=True)
class Reproduction:
    """The tables that were made.

    Attributes:
        model: what they were made on.
        studies: the protocol of each table, by name.
        results: the run of each table, by name; those of an interrupted reproduction may lack.
        seconds: wall time of each finished pass by its tables, such as ``table2+table3``.
        complete: False when it was interrupted.
        where: where it was run (`persona_nnsight.backends.interface.Backend.record`).
    """

    model: Model
    studies: dict[str, PaperTable]
    results: dict[str, Result]
    seconds: dict[str, float]
    complete: bool
    where: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all of it but the model's weights, as of a `Result`."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**kept, "model": self.model.without_weights()}

    def table(self, name: str) -> pd.DataFrame:
        """Ours beside the published (`persona_nnsight.reproduction.comparison.comparison`)."""
        return self._tables[name]

    @cached_property
    def _tables(self) -> dict[str, pd.DataFrame]:
        return {name: comparison(self.studies[name], r) for name, r in self.results.items()}

    def save(self, directory: str | Path, *, finishes: bool = False) -> Path:
        """Write the run of every table into a directory of its own, and the tables beside them.

        Args:
            directory: where the runs go.
            finishes: it may hold the journal of this run, which then goes.

        Raises:
            PersonaError: the directory already holds something, or cannot be written.
        """
        return save_run(Path(directory), self._write_files, finishes=finishes)

    def _write_files(self, directory: Path) -> None:
        for name, result in self.results.items():
            (directory / name).mkdir()
            result.write_files(directory / name)
            self.table(name).to_csv(directory / f"{name}.csv", index=False)
        manifest = reproduction_manifest(
            self.model,
            {name: result.plan for name, result in self.results.items()},
            self.seconds,
            complete=self.complete,
            where=self.where,
        )
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (directory / "run.json").write_text(
            text + "\n", encoding="utf-8", errors="backslashreplace"
        )


def plan_reproduction(
    model: Model,
    short: Grid,
    long: Grid,
    only: str | Iterable[str] | None = None,
    date: Day | None = None,
) -> list[PaperTable]:
    """What `reproduce` will run, table by table, all on one day."""
    day = rendering_of(model.tokenizer, date).date
    return [plan_table(table, model, short, long, day) for table in parse_targets(only)]


def reproduce(
    model: Model,
    *,
    short: Grid | None = None,
    long: Grid | None = None,
    only: str | Iterable[str] | None = None,
    date: Day | None = None,
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> Reproduction:
    """Make the paper's tables on a model.

    Args:
        model: from `load_model`.
        short, long: grids in place of the built-in ones.
        only: tables to make, such as ``table1,figure1``; None for all.
        date: the day that goes into prompts, as for every experiment.
        progress: called with (rows done, rows in all).
        backend: what does the work (`persona_nnsight.backends`); None does it here.

    Raises:
        PersonaError: bad input, or a value that is not finite.
        ReproductionInterrupted: Ctrl-C; holds what was finished.
    """
    grids = short or Grid.load("short"), long or Grid.load("long")
    tables = plan_reproduction(model, *grids, only, date)
    return carry_out(model, tables, progress, backend)


class ReproductionInterrupted(KeyboardInterrupt):
    """Ctrl-C during a reproduction; ``reproduction`` holds what was finished."""

    def __init__(self, reproduction: Reproduction) -> None:
        super().__init__()
        self.reproduction = reproduction

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reproduction,)


def in_passes(tables: Sequence[PaperTable]) -> list[list[PaperTable]]:
    """The tables that share a pass: Table 1 has the short grid, the others the long one."""
    short = [table for table in tables if table.name == "table1"]
    long = [table for table in tables if table.name != "table1"]
    return [found for found in (short, long) if found]


def joint_plan(tables: Sequence[PaperTable]) -> Plan:
    """What one pass does, for its cost."""
    return join([table.plan for table in tables]).plan


def carry_out(
    model: Model,
    tables: Sequence[PaperTable],
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> Reproduction:
    """Run the tables, those over one grid together; see `reproduce`."""
    worker = LocalBackend(model) if backend is None else backend
    passes = in_passes(tables)
    totals = [joint_plan(found).n_results for found in passes]
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    detached: Detached | None = None

    def reproduction(*, complete: bool) -> Reproduction:
        by_name = {table.name: table for table in tables}
        return Reproduction(model, by_name, results, seconds, complete, worker.record())

    for number, found in enumerate(passes):
        before = sum(totals[:number])

        def report(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, sum(totals))

        try:
            made = execute_together(model, found, report, worker)
        except Interrupted as stopped:
            results.update((found[part].name, r) for part, r in stopped.results.items())
            raise ReproductionInterrupted(reproduction(complete=False)) from stopped
        except Detached as elsewhere:
            detached = elsewhere  # the other passes' jobs can be on their way too
            continue
        results.update(zip((table.name for table in found), made, strict=True))
        seconds["+".join(table.name for table in found)] = made[0].seconds["total"]
    if detached is not None:
        raise detached
    return reproduction(complete=True)
