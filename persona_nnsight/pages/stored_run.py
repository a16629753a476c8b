"""What a run directory holds, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.prompts.grids import Grid


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        name: of the directory.
        manifest: ``run.json``.
        grid: the grid that the run took its cells from; None for a reproduction.
        tables: by file name without its ending: ``kl``, ``summary``, ``contrasts``, ``geometry``,
            ``markers``, and in a reproduction ``table1`` to ``table4``; those that are there.
        texts: the objects of ``text.jsonl``.
        parts: the runs inside a reproduction, by name, in the paper's order.
    """

    name: str
    manifest: Mapping[str, Any]
    grid: Grid | None
    tables: Mapping[str, pd.DataFrame]
    texts: Sequence[Mapping[str, Any]]
    parts: Mapping[str, Run] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that made the run."""
        return str(self.manifest["command"])

    @property
    def complete(self) -> bool:
        """Whether the run, with all its parts, came to its end."""
        return self.manifest.get("complete", True) is not False and all(
            part.complete for part in self.parts.values()
        )

    def facts(self, name: str) -> Mapping[str, Any]:
        """A mapping of the manifest such as ``model``; empty where an older run has none."""
        value: Mapping[str, Any] = self.manifest.get(name) or {}
        return value

    def markers(self, persona: str) -> tuple[str, ...]:
        """The markers of a persona."""
        known = {} if self.grid is None else {p.key: p.markers for p in self.grid.personas}
        return known.get(persona, ())
