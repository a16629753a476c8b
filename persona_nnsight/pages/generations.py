"""Generated texts side by side, with the markers of the persona highlighted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from persona_nnsight.method.marker_words import distinct_markers, find_markers
from persona_nnsight.pages.blocks import Generations, Passage, Passages
from persona_nnsight.pages.numbers import plain
from persona_nnsight.pages.stored_run import Run


def generations(run: Run) -> list[Generations]:
    """The texts of a run, persona by persona, in the order of the file."""
    personas = {} if run.grid is None else {p.key: p.text for p in run.grid.personas}
    tasks = {} if run.grid is None else {t.key: t.text for t in run.grid.tasks}
    grouped: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for text in run.texts:
        grouped.setdefault(text["persona"], {}).setdefault(text["task"], []).append(text)
    several = len({text.get("position") for text in run.texts if text.get("layers")}) > 1
    return [
        Generations(
            persona,
            personas.get(persona, ""),
            run.markers(persona),
            [
                Passages(
                    task,
                    tasks.get(task, ""),
                    [_passage(text, run.markers(persona), several) for text in texts],
                )
                for task, texts in cells.items()
            ],
        )
        for persona, cells in grouped.items()
    ]


def highlight(text: str, markers: Sequence[str]) -> Markup:
    """A text as HTML with its markers in ``mark`` elements; overlapping ones share one."""
    pieces: list[Markup] = []
    at = 0
    spans: list[list[int]] = []
    for _, start, end in find_markers(text, markers):
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    for start, end in spans:
        pieces += [Markup.escape(text[at:start]), Markup("<mark>{}</mark>").format(text[start:end])]
        at = end
    return Markup("").join([*pieces, Markup.escape(text[at:])])


def _passage(text: Mapping[str, Any], markers: Sequence[str], several: bool) -> Passage:
    found = len(distinct_markers(text["text"], markers))
    notes = [f"{text['n_tokens']} tokens"] if "n_tokens" in text else []
    if markers:
        notes.append(f"{found or 'no'} marker{'' if found == 1 else 's'}")
    return Passage(_edit(text, several), highlight(text["text"], markers), ", ".join(notes))


def _edit(text: Mapping[str, Any], several: bool) -> str:
    parts = [str(text["condition"])]
    if text.get("layers"):
        parts.append(f"L{text['layers']}")
        if several and text.get("position"):
            parts.append(f"at {text['position']}")
    for name, symbol in (("alpha", "α"), ("beta", "β")):
        value = text.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            parts.append(f"{symbol} = {plain(value)}")
    return " ".join(parts)
