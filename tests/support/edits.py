"""Edits as the oracles carry them out."""

from __future__ import annotations

from collections.abc import Iterator

from persona_nnsight.plan.interventions import Write
from persona_nnsight.plan.plan import Edit


def written_sites(edit: Edit) -> Iterator[tuple[Write, str, int]]:
    """What an edit writes, at every position and layer; nothing where it is unedited."""
    if isinstance(write := edit.intervention, Write):
        yield from ((write, name, layer) for name in write.positions for layer in write.layers)
