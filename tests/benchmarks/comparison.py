"""One row of the table: ours on the whole plan, the published procedure on a stated subset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from studies import study_of

from benchmarks.floor import floor
from benchmarks.lengths import Lengths
from benchmarks.measure import Measured, measure
from benchmarks.procedure import (
    CellNumbers,
    Counts,
    Procedure,
    full_forwards,
    planned,
    scaled_seconds,
    work_of,
)
from benchmarks.remote import job_bytes
from benchmarks.work import Shapes, Work
from benchmarks.workloads import Subset, Workload, subset_of
from persona_nnsight import CaptureResult, EditResult, Model
from persona_nnsight.experiments.execution import execute
from persona_nnsight.experiments.results import Result
from persona_nnsight.plan.joining import part_of


@dataclass(frozen=True)
class Agreement:
    """How far the procedure's numbers on its subset are from ours.

    Attributes:
        kl: largest difference of a KL, in nats; NaN where none was taken.
        kls: how many were compared.
        residual: largest distance of two residuals at a site, as a share of the length of the
            procedure's; NaN where ours hands none back.
        continuations, texts: how many of (equal, compared).
    """

    kl: float
    kls: int
    residual: float
    continuations: tuple[int, int]
    texts: tuple[int, int]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: of the workload.
        n_cells, n_edits: of the plan.
        subset: what the procedure was run on.
        ours: what ours took.
        published_seconds: of the procedure on the whole plan, scaled by counted forwards.
        timed, whole: forwards of the procedure on its subset, with their times, and on the plan.
        published, floor: work of the procedure on the whole plan, and the least there is.
        flops: of ours, the procedure and the floor, by those names.
        agreement: of the numbers.
        jobs: bytes that each remote job would send.
    """

    name: str
    n_cells: int
    n_edits: int
    subset: Subset
    ours: Measured
    published_seconds: float
    timed: Counts
    whole: Counts
    published: Work
    floor: Work
    flops: Mapping[str, float]
    agreement: Agreement
    jobs: list[int]

    @property
    def ratio(self) -> float:
        """How many times as long the published procedure takes."""
        return self.published_seconds / self.ours.seconds


def compare(
    model: Model,
    workload: Workload,
    shapes: Shapes,
    procedure: Procedure,
    *,
    cells: int,
    edits: int,
) -> Row:
    """Run ours and the procedure.

    Args:
        model: with its weights.
        workload: the row.
        shapes: of the model.
        procedure: of the same weights.
        cells, edits: how many of them the procedure is timed on, at most.

    Raises:
        RuntimeError: the procedure took other forwards than were counted for it.
    """
    plan, grid = workload.plan, workload.grid
    one_cell = study_of(grid, part_of(plan, range(1)))
    execute(model, one_cell)  # what only a first run takes is not timed
    result, ours = measure(model, lambda: execute(model, study_of(grid, plan)))
    lengths = Lengths.of(result)

    subset = subset_of(plan, cells, edits)
    procedure.generate(plan.prompts[0].ids, 2)
    procedure.reset()
    numbers = {
        cell: procedure.run_cell(plan, cell, subset.edits, result.continuations[cell])
        for cell in subset.cells
    }
    timed = dict(procedure.counts)
    expected = planned(plan, lengths, subset.cells, subset.edits)
    if full_forwards(timed) != full_forwards(expected):
        raise RuntimeError(
            f"{workload.name}: {full_forwards(timed)} full forwards were run where "
            f"{full_forwards(expected)} were counted"
        )
    whole = planned(plan, lengths, range(len(plan.cells)), range(len(plan.edits)))
    n_layers = model.tree.n_layers
    work = {
        "ours": ours.work,
        "published": work_of(whole, n_layers),
        "floor": floor(plan, n_layers, lengths),
    }
    return Row(
        name=workload.name,
        n_cells=len(plan.cells),
        n_edits=len(plan.edits),
        subset=subset,
        ours=ours,
        published_seconds=scaled_seconds(timed, whole),
        timed=timed,
        whole=whole,
        published=work["published"],
        floor=work["floor"],
        flops={name: shapes.flops(each) for name, each in work.items()},
        agreement=_agreement(model, result, numbers),
        jobs=job_bytes(model, plan),
    )


def _agreement(model: Model, result: Result, numbers: Mapping[int, CellNumbers]) -> Agreement:
    kls = _kl_differences(result, numbers)
    continuations = [
        found.continuation == result.continuations[cell]
        for cell, found in numbers.items()
        if found.continuation
    ]
    texts = _texts_equal(model, result, numbers)
    return Agreement(
        kl=max(kls, default=math.nan),
        kls=len(kls),
        residual=max(_residual_distances(result, numbers), default=math.nan),
        continuations=(sum(continuations), len(continuations)),
        texts=(sum(texts), len(texts)),
    )


def _kl_differences(result: Result, numbers: Mapping[int, CellNumbers]) -> list[float]:
    if not isinstance(result, EditResult):
        return []
    ours = {(score.cell, score.edit): score.kl for score in result.scores}
    pairs = [
        (value, ours[cell, edit])
        for cell, found in numbers.items()
        for edit, value in found.kls.items()
    ]
    # A KL that one side alone lacks is as far off as can be.
    return [
        math.inf if math.isnan(theirs) != math.isnan(own) else abs(theirs - own)
        for theirs, own in pairs
        if not (math.isnan(theirs) and math.isnan(own))
    ]


def _texts_equal(model: Model, result: Result, numbers: Mapping[int, CellNumbers]) -> list[bool]:
    plan = result.plan
    ours = {(t.persona, t.task, t.condition, t.layers): (t.text, t.n_tokens) for t in result.texts}
    equal = []
    for cell, found in numbers.items():
        for number, tokens in found.texts.items():
            edit = plan.edits[number]
            layers = None if edit.is_unedited else edit.columns["layers"]
            key = (plan.cells[cell].persona, plan.cells[cell].task, edit.name, layers)
            text = model.tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            equal.append(ours[key] == (text, len(tokens)))
    return equal


def _residual_distances(result: Result, numbers: Mapping[int, CellNumbers]) -> list[float]:
    if not isinstance(result, CaptureResult):
        return []
    distances = []
    for cell, found in numbers.items():
        for key, theirs in found.residuals.items():
            ours = result.residuals[key][cell, : len(theirs)].to(theirs.device)
            shares = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
            distances.append(float(shares.max()))
    return distances
