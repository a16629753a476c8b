"""Sections that several experiments show of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from persona_nnsight.analysis.wording import resampling_of
from persona_nnsight.pages import table_blocks
from persona_nnsight.pages.blocks import Block, Section, Table
from persona_nnsight.pages.figures.geometry import geometry_by_layer
from persona_nnsight.pages.generations import generations
from persona_nnsight.pages.stored_run import Run

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.pages.figures.canvas import Figure


def summaries(run: Run) -> Iterator[pd.DataFrame]:
    """The summary of a run, if it has one with rows."""
    summary = run.tables.get("summary")
    if summary is not None and len(summary):
        yield summary


def summary_and_cells(run: Run) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """The summary and the KLs of a run, if it has both."""
    for summary in summaries(run):
        if "kl" in run.tables:
            yield summary, run.tables["kl"]


def kl_sections(run: Run, question: str, figures: Sequence[Figure | None]) -> list[Section]:
    """What the edits of a run with KLs did, drawn and in numbers; see `edit_sections`."""
    return edit_sections(
        run, question, figures, table_blocks.kl_table, table_blocks.contrast_table, {}
    )


def edit_sections(
    run: Run,
    question: str,
    figures: Sequence[Figure | None],
    summary_table: Callable[[pd.DataFrame, str], Table],
    contrast_table: Callable[[pd.DataFrame, str], Table],
    meanings: Mapping[str, str],
) -> list[Section]:
    """What the edits did, drawn and in numbers; nothing where a run has no summary.

    Args:
        run: what its directory holds.
        question: the title of the first section.
        figures: those it has; None for one that its tables have nothing for.
        summary_table, contrast_table: the tables of the second section.
        meanings: what conditions write, where it is not what they write elsewhere.
    """
    for summary in summaries(run):
        written = list(dict.fromkeys(summary["condition"]))
        meaning = table_blocks.meaning_table(written, meanings)
        shown: list[Block] = [block for block in (meaning, *figures) if block is not None]
        contrasts = run.tables.get("contrasts")
        # The intervals of older versions were made otherwise.
        is_new = "verdict" in contrasts if contrasts is not None else "floor" in summary
        resampling = resampling_of(run.tables) if is_new else None
        drawn = resampling.method if resampling else ""
        numbers: list[Block] = [summary_table(summary, drawn)]
        if contrasts is not None and len(contrasts):
            numbers.append(contrast_table(contrasts, drawn))
        return [Section("effects", question, shown), Section("numbers", "In numbers", numbers)]
    return []


def geometry_section(run: Run) -> list[Section]:
    """How the effects add up, if the run measured it."""
    table = run.tables.get("geometry")
    if table is None or not len(table):
        return []
    blocks: list[Block] = [*geometry_by_layer(table), table_blocks.geometry_table(table)]
    return [Section("geometry", "Do the effects add up in the residual stream?", blocks)]


def texts_section(run: Run) -> list[Section]:
    """The texts of a run, if it has any."""
    if not run.texts:
        return []
    intro = "Greedy text of every cell under every edit."
    if any(run.markers(text["persona"]) for text in run.texts):
        intro += " Words that give the persona away are marked."
    return [Section("texts", "Generated texts", generations(run), intro=intro)]
