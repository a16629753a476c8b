"""What the page of a reproduction shows of all its tables: Figure 1, the published numbers."""

from __future__ import annotations

from persona_nnsight.pages.blocks import Section
from persona_nnsight.pages.figures.substitute import kl_by_layer_and_position
from persona_nnsight.pages.stored_run import Run
from persona_nnsight.reproduction.beside_published import beside_published
from persona_nnsight.reproduction.protocol import TABLES

#: Tables whose KL by layer is drawn in Figure 1, as their ids begin, and the figure it replaces.
FIGURE1_PARTS = ("table1-", "table2-")
FIGURE1_BY_PART = "kl-by-layer"


def reproduction_sections(run: Run) -> list[Section]:
    """Figure 1, and each table beside the published one."""
    sections = []
    drawn = {
        f"Table {name.removeprefix('table')}": part.tables["summary"]
        for name, part in run.parts.items()
        if f"{name}-" in FIGURE1_PARTS and part.tables.get("summary") is not None
    }
    if drawn:
        sections.append(Section("figure1", "Figure 1", kl_by_layer_and_position(drawn)))
    beside = [
        table
        for name in TABLES
        if name in run.tables
        for table in beside_published(name, run.tables[name])
    ]
    if beside:
        sections.append(
            Section(
                "published",
                "Beside the published numbers",
                beside,
                intro="Xu 2026, As X, Do Y (arXiv 2605.23147). A difference is given only where "
                "the model is the same.",
            )
        )
    return sections
