"""What the page says about a run: which figures and tables each command has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from persona_nnsight.report import table_blocks
from persona_nnsight.report.beside_published import beside_published
from persona_nnsight.report.blocks import Block, Picture, RunPage, Section
from persona_nnsight.report.figures import geometry, inject, markers, steer, substitute
from persona_nnsight.report.figures.canvas import Figure, inline_svg
from persona_nnsight.report.generations import generations
from persona_nnsight.report.provenance import provenance
from persona_nnsight.report.reading import KL_COMMANDS, PARTS, Run

if TYPE_CHECKING:
    import pandas as pd

_TITLES = {
    "capture": "Capture",
    "substitute": "Substitution",
    "inject": "Injection",
    "markers": "Markers",
    "steer": "Steering",
    "reproduce": "Reproduction",
}
#: What is written elsewhere at a few sites says little about geometry.
_GEOMETRY_COMMANDS = ("capture", "substitute")
_FOUND_TABLES = ("summary", "contrasts", "geometry", "markers")


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
    sections = _reproduction(run, prefix) if run.command == "reproduce" else _run(run, prefix)
    sections.append(
        Section(
            f"{prefix}provenance",
            "Where the numbers come from",
            [provenance(run)],
            folded=bool(number),
        )
    )
    return RunPage(
        id=f"{prefix}run",
        title=": ".join(filter(None, [number, _title(run)])),
        subtitle=_subtitle(run),
        interrupted=_interrupted(run),
        findings=_findings(run),
        sections=sections,
        parts=parts,
    )


def pictures(page: RunPage) -> list[Picture]:
    """Every figure of a run and its parts."""
    own = [b for section in page.sections for b in section.blocks if isinstance(b, Picture)]
    return own + [picture for part in page.parts for picture in pictures(part)]


def _run(run: Run, prefix: str) -> list[Section]:
    sections = _effects(run, prefix)
    if run.command in _GEOMETRY_COMMANDS and len(run.tables.get("geometry", ())):
        table = run.tables["geometry"]
        sections.append(
            Section(
                f"{prefix}geometry",
                "Do the effects add up in the residual stream?",
                [
                    *(_picture(figure, prefix) for figure in geometry.geometry_by_layer(table)),
                    table_blocks.geometry_table(table),
                ],
            )
        )
    if run.texts:
        sections.append(
            Section(
                f"{prefix}texts",
                "Generated texts",
                generations(run),
                intro="Greedy text of every cell under every edit. Words that give the persona "
                "away are marked."
                if any(run.markers(text["persona"]) for text in run.texts)
                else "Greedy text of every cell under every edit.",
            )
        )
    return sections


def _effects(run: Run, prefix: str) -> list[Section]:
    """The sections about what the edits did."""
    summary = run.tables.get("summary")
    if summary is None or not len(summary):
        return []
    cells = run.tables.get("kl")
    figures: list[Figure | None] = []
    if run.command == "markers":
        figures = [markers.marker_bars(summary)]
    elif cells is not None and run.command == "substitute":
        figures = [
            substitute.kl_by_layer(summary) if not prefix.endswith(_FIGURE1_PARTS) else None,
            substitute.site_maps(summary),
            substitute.cell_dots(summary, cells),
            *substitute.by_persona_and_task(cells),
        ]
    elif cells is not None and run.command == "inject":
        figures = [inject.injection_bars(summary, cells)]
    elif run.command == "steer":
        figures = [steer.steering_curves(summary, run.tables.get("markers"))]
    meanings = table_blocks.meaning_table(list(dict.fromkeys(summary["condition"])), run.command)
    blocks: list[Block] = [_picture(figure, prefix) for figure in figures if figure is not None]
    sections = [
        Section(
            f"{prefix}effects",
            {
                "markers": "Does the text still show the persona?",
                "substitute": "What changes when one residual is overwritten?",
                "inject": "Can the persona be written into a prompt that does not name it?",
                "steer": "What do other strengths of the two effects do?",
            }[run.command],
            [*([meanings] if meanings else []), *blocks],
        )
    ]
    in_numbers: list[Block] = [
        table_blocks.kl_table(summary)
        if run.command in KL_COMMANDS
        else table_blocks.marker_table(summary)
    ]
    contrasts = run.tables.get("contrasts")
    if contrasts is not None and len(contrasts):
        make = (
            table_blocks.marker_contrast_table
            if run.command == "markers"
            else table_blocks.contrast_table
        )
        in_numbers.append(make(contrasts))
    sections.append(Section(f"{prefix}numbers", "In numbers", in_numbers))
    return sections


#: Parts of a reproduction whose KL by layer is drawn in its Figure 1.
_FIGURE1_PARTS = ("table1-", "table2-")


def _reproduction(run: Run, prefix: str) -> list[Section]:
    sections = []
    drawn = {
        f"Table {name.removeprefix('table')}": part.tables["summary"]
        for name, part in run.parts.items()
        if f"{name}-" in _FIGURE1_PARTS and part.tables.get("summary") is not None
    }
    if drawn:
        figures = substitute.kl_by_layer_and_position(drawn)
        sections.append(
            Section(f"{prefix}figure1", "Figure 1", [_picture(f, prefix) for f in figures])
        )
    beside: list[Block] = [
        table
        for name in PARTS
        if name in run.tables
        for table in beside_published(name, run.tables[name])
    ]
    if beside:
        sections.append(
            Section(
                f"{prefix}published",
                "Beside the published numbers",
                beside,
                intro="Xu 2026, As X, Do Y (arXiv 2605.23147). A difference is given only where "
                "the model is the same.",
            )
        )
    return sections


def _picture(figure: Figure, prefix: str) -> Picture:
    stem = f"{prefix}{figure.name}"
    panels = [
        # Drawn by us from numbers and names, which matplotlib escapes.
        (Markup(inline_svg(panel, f"{stem}-{i}")), panel.label)
        for i, panel in enumerate(figure.panels, start=1)
    ]
    return Picture(figure, stem, panels)


def _title(run: Run) -> str:
    title = _TITLES[run.command]
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
    from persona_nnsight.analysis.findings import CAVEAT, findings

    found = {name: run.tables[name] for name in _FOUND_TABLES if name in run.tables}
    summary = found.get("summary")
    if run.command == "reproduce" or (summary is not None and not _has_intervals(summary)):
        return []  # a sentence without an interval would say too much
    said = findings(run.command, found)
    return [*said, CAVEAT] if said else []


def _has_intervals(summary: pd.DataFrame) -> bool:
    """Whether a summary has the intervals of its numbers, which older runs lack."""
    measures = ("median", "recovered", "gap_closed", "any", "distinct")
    return all(f"{name}_lo" in summary for name in measures if name in summary)
