"""Carrying out plans: the engine's events are gathered into results."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from persona_nnsight.analysis.geometry_tables import geometry_table
from persona_nnsight.analysis.marker_tables import Text
from persona_nnsight.backends.interface import Backend
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.engine.run import run
from persona_nnsight.experiments.experiment import Experiment, Progress
from persona_nnsight.experiments.results import Result
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.costs import Cost, estimate
from persona_nnsight.plan.events import Event, Recorded, Scored, Written
from persona_nnsight.plan.joining import JointPlan, join
from persona_nnsight.plan.plan import Plan
from persona_nnsight.prompts.grids import Grid
from persona_nnsight.storage.residuals import Residuals

R = TypeVar("R", bound=Result)

#: Held by the thread whose run has its turn: nnsight can trace in one thread at a time, and the
#: engine changes a model while it runs. A callback of the run may begin another.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Study(Generic[R]):
    """An experiment on a grid, planned for a model."""

    experiment: Experiment[R]
    grid: Grid
    plan: Plan


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``results`` holds what was finished, by the place of its plan."""

    def __init__(self, results: dict[int, Result]) -> None:
        super().__init__()
        self.results = results

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.results,)


def execute(
    model: Model,
    study: Study[R],
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> R:
    """Carry out a study that was planned for this model, and gather its results.

    `backend` does the work; None does it here.

    Raises:
        PersonaError: a value that is not finite, or memory that runs out.
        Interrupted: Ctrl-C; holds what was finished.
    """
    return execute_together(model, [study], progress, backend)[0]


def execute_together(
    model: Model,
    studies: Sequence[Study[R]],
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> list[R]:
    """Carry out several studies in one pass, so that what they share is computed once.

    The results are in the order of `studies` and equal those of studies carried out one by one.
    `backend` does the work; None does it here. Of several threads one works, and the others wait.

    Raises:
        PersonaError: a value that is not finite, or memory that runs out.
        Interrupted: Ctrl-C; holds what was finished.
    """
    joint = join([study.plan for study in studies])
    worker = LocalBackend(model) if backend is None else backend
    with _ONE_AT_A_TIME:
        return _carried_out(model, studies, joint, progress, worker)


def _carried_out(
    model: Model,
    studies: Sequence[Study[R]],
    joint: JointPlan,
    progress: Progress | None,
    worker: Backend,
) -> list[R]:
    """What `execute_together` does when its turn has come."""
    limits = worker.limits(joint.plan)
    gathered = [_Gathered(model, study) for study in studies]
    start = time.perf_counter()
    seconds = {"first_cells_recorded": 0.0}

    def result(part: int, *, complete: bool) -> R:
        cost = estimate(joint.parts[part], model, limits)
        seconds["total"] = time.perf_counter() - start
        return gathered[part].result(
            cost, dict(seconds), worker.record(joint.plan), complete=complete
        )

    done = 0
    try:
        for event in worker.run(run, joint.plan, limits):
            for part, own in joint.split(event):
                gathered[part].take(own)
            if isinstance(event, Recorded):
                first = seconds["first_cells_recorded"] or time.perf_counter() - start
                seconds["first_cells_recorded"] = first
            done += len(event.cells) if isinstance(event, Recorded) else 1
            if progress is not None:
                progress(done, joint.plan.n_results)
    except KeyboardInterrupt as interrupt:
        finished = [part for part, each in enumerate(gathered) if each.has_results]
        raise Interrupted({part: result(part, complete=False) for part in finished}) from interrupt
    return [result(part, complete=True) for part in range(len(studies))]


@dataclass
class _Gathered(Generic[R]):
    """What the engine has handed over for one study so far."""

    model: Model
    study: Study[R]
    recorded: list[Recorded] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    texts: list[Written] = field(default_factory=list)

    @property
    def has_results(self) -> bool:
        keeps = self.study.plan.keeps_residuals
        return bool(self.scores or self.texts or (keeps and self.recorded))

    def take(self, event: Event) -> None:
        match event:
            case Recorded():
                self.recorded.append(event)
            case Scored():
                self.scores.append(event)
            case Written():
                self.texts.append(event)

    def result(
        self, cost: Cost, seconds: dict[str, float], where: dict[str, Any], *, complete: bool
    ) -> R:
        plan = self.study.plan
        texts = sorted(self.texts, key=lambda text: (text.cell, text.edit))
        continuations = {
            cell: tokens
            for event in self.recorded
            for cell, tokens in zip(event.cells, event.continuations, strict=True)
        }
        margins = {
            cell: min(each)
            for event in self.recorded
            for cell, each in zip(event.cells, event.margins, strict=True)
        }
        cells = sorted(continuations)
        kept = [(event.cells, event.residuals or {}) for event in self.recorded]
        return self.study.experiment.result_type()(
            experiment=self.study.experiment,
            model=self.model,
            grid=self.study.grid,
            plan=plan,
            cost=cost,
            continuations={cell: continuations[cell] for cell in cells},
            margins=margins,
            geometry=geometry_table(plan, cells, self._geometry()),
            scores=self.scores,
            texts=[_text(self.model, plan, text) for text in texts],
            residuals=Residuals(kept) if plan.keeps_residuals else None,
            seconds=seconds,
            complete=complete,
            where=where,
        )

    def _geometry(self) -> dict[str, torch.Tensor]:
        """What the chunks hold, by measure: their cells joined, in the order of the plan."""
        cells = torch.tensor([cell for event in self.recorded for cell in event.cells])
        parts = [event.geometry for event in self.recorded]
        return {key: torch.cat([part[key] for part in parts])[cells.argsort()] for key in parts[0]}


def _text(model: Model, plan: Plan, written: Written) -> Text:
    cell, edit = plan.cells[written.cell], plan.edits[written.edit]
    sites = {} if edit.is_unedited else edit.columns
    return Text(
        persona=cell.persona,
        task=cell.task,
        condition=edit.name,
        **{name: sites.get(name) for name in ("position", "layers", "alpha", "beta")},
        text=str(
            model.tokenizer.decode(
                list(written.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        ),
        n_tokens=len(written.tokens),
    )
