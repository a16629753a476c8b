"""What the page says about a run: what its experiment shows, and what every run has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from markupsafe import Markup

from persona_nnsight.analysis.columns import COLUMN
from persona_nnsight.experiments.registry import experiment_named
from persona_nnsight.pages.blocks import Picture, RunPage, Section
from persona_nnsight.pages.figures.canvas import Figure, inline_svg
from persona_nnsight.pages.run_sections import texts_section
from persona_nnsight.pages.stored_run import Run
from persona_nnsight.report.provenance import provenance
from persona_nnsight.reproduction.page import (
    FIGURE1_BY_PART,
    FIGURE1_PARTS,
    reproduction_sections,
)

if TYPE_CHECKING:
    import pandas as pd


def run_page(run: Run, prefix: str = "", number: str = "") -> RunPage:
    """Lay out one run.

    Args:
        run: what its directory holds.
        prefix: what its ids and the names of its figures start with; unique on the page.
        number: what its title starts with, such as ``Table 1``.
    """
    parts = [
        run_page(part, f"{prefix}{name}-", f"Table {name.removeprefix('table')}")
        for name, part in run.parts.items()
    ]
    if run.command == "reproduce":
        sections = reproduction_sections(run)
    else:
        own = experiment_named(run.command).sections(run)
        sections = [*own, *texts_section(run)]
    source = Section(
        "provenance", "Where the numbers come from", [provenance(run)], folded=bool(number)
    )
    return RunPage(
        id=f"{prefix}run",
        title=": ".join(filter(None, [number, _title(run)])),
        subtitle=_subtitle(run),
        interrupted=_interrupted(run),
        findings=_findings(run),
        sections=[_placed(section, prefix) for section in [*sections, source]],
        parts=parts,
    )


def pictures(page: RunPage) -> list[Picture]:
    """Every figure of a run and its parts."""
    own = [b for section in page.sections for b in section.blocks if isinstance(b, Picture)]
    return own + [picture for part in page.parts for picture in pictures(part)]


def _placed(section: Section, prefix: str) -> Section:
    """A section where it stands on the page, its figures drawn; those of Figure 1 are above."""
    drawn_above = (FIGURE1_BY_PART,) if prefix.endswith(FIGURE1_PARTS) else ()
    return replace(
        section,
        id=f"{prefix}{section.id}",
        blocks=[
            _picture(block, prefix) if isinstance(block, Figure) else block
            for block in section.blocks
            if not (isinstance(block, Figure) and block.name in drawn_above)
        ],
    )


def _picture(figure: Figure, prefix: str) -> Picture:
    stem = f"{prefix}{figure.name}"
    panels = [
        # Drawn by us from numbers and names, which matplotlib escapes.
        (Markup(inline_svg(panel, f"{stem}-{i}")), panel.label)
        for i, panel in enumerate(figure.panels, start=1)
    ]
    return Picture(figure, stem, panels)


def _title(run: Run) -> str:
    reproduces = run.command == "reproduce"
    title = "Reproduction" if reproduces else experiment_named(run.command).title
    model = run.facts("model").get("id")
    return f"{title}, {model}" if model else title


def _subtitle(run: Run) -> str:
    parts = [f"persona {run.command}"]
    if run.grid is not None:
        cells = len(run.manifest.get("cells") or [])
        parts.append(f"grid {run.grid.name}" + (f", {_counted(cells, 'cell')}" if cells else ""))
    model = run.facts("model")
    if model.get("dtype") and model.get("device"):
        parts.append(f"{model['dtype']} on {model['device']}")
    return " · ".join([*parts, run.name])


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _interrupted(run: Run) -> str:
    if run.complete:
        return ""
    unfinished = [name for name, part in run.parts.items() if not part.complete]
    if unfinished:
        return (
            f"This reproduction was interrupted in {', '.join(unfinished)}. Its tables hold only "
            "what was finished."
        )
    cells = len(run.manifest.get("cells") or [])
    done = _cells_with_rows(run.tables)
    if cells:
        return (
            f"This run was interrupted. Its tables hold rows of {done} of {_counted(cells, 'cell')}"
            ", and only those numbers are shown."
        )
    return "This run was interrupted. Its tables hold only what was finished."


def _cells_with_rows(found: Mapping[str, pd.DataFrame]) -> int:
    for name in ("kl", "markers", "geometry"):
        if name in found:
            table = found[name]
            return len(set(zip(table["persona"], table["task"], strict=True)))
    return 0


def _findings(run: Run) -> Sequence[str]:
    from persona_nnsight.analysis.wording import caveat, ties

    summary = run.tables.get("summary")
    if run.command == "reproduce" or (summary is not None and not _has_intervals(summary)):
        return []  # a sentence without an interval would say too much
    said = experiment_named(run.command).findings(run.tables)
    cells = [cell for cell in run.manifest.get("cells") or [] if isinstance(cell, Mapping)]
    said += ties(
        margin
        for margin in (cell.get("smallest_margin") for cell in cells)
        if isinstance(margin, int | float)
    )
    return [*said, caveat(run.tables)] if said else []


def _has_intervals(summary: pd.DataFrame) -> bool:
    """Whether a summary has the intervals of its numbers, which older runs lack."""
    return all(
        set(COLUMN[name].names) <= set(summary)
        for name in summary
        if name in COLUMN and COLUMN[name].has_interval
    )
