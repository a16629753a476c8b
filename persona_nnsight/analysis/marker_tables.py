"""Generated texts and the markers in them as tidy tables, and over cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from persona_nnsight.analysis.columns import CELL, FACTORS, cells_of, wide_by_edit
from persona_nnsight.analysis.resampling import Crossed, Floats
from persona_nnsight.analysis.verdicts import interval, simultaneous, verdicts
from persona_nnsight.method.conditions import MARKER_CONTROLS
from persona_nnsight.method.marker_words import distinct_markers
from persona_nnsight.method.sites import NO_LAYERS

if TYPE_CHECKING:
    from persona_nnsight.prompts.grids import Grid


@dataclass(frozen=True)
class Text:
    """Greedy text of one cell under one edit; no position and layers where nothing is written.

    ``alpha`` and ``beta`` are the factors of a ``steer``, None under any other condition.
    """

    persona: str
    task: str
    condition: str
    position: str | None
    layers: str | None
    alpha: float | None
    beta: float | None
    text: str
    n_tokens: int


def marker_table(grid: Grid, texts: Iterable[Text]) -> pd.DataFrame:
    """One row per text: whether a marker of its persona occurs, how many distinct ones, which.

    The texts of personas without markers are left out.
    """
    markers = {persona.key: persona.markers for persona in grid.personas}
    rows = []
    for text in texts:
        if not markers[text.persona]:
            continue
        hits = distinct_markers(text.text, markers[text.persona])
        rows.append(
            {
                **{name: getattr(text, name) for name in (*CELL, "condition")},
                "position": text.position or NO_LAYERS,
                "layers": text.layers or NO_LAYERS,
                **{name: getattr(text, name) for name in FACTORS},
                "any": bool(hits),
                "distinct": len(hits),
                "hits": "; ".join(hits),
            }
        )
    table = pd.DataFrame(
        rows,
        columns=[
            *(*CELL, "condition", "position", "layers", *FACTORS),
            *("any", "distinct", "hits"),
        ],
    )
    return table if table["alpha"].notna().any() else table.drop(columns=FACTORS)


def marker_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Markers over cells, one row per edit, with 95 % intervals, each by itself.

    ``any`` counts the cells whose text has a marker, ``distinct`` is the mean number of distinct
    markers in a text, ``n`` the number of cells. Where all cells are the same the draws are too,
    and the interval is left empty.
    """
    summary, (any_found, distinct) = wide_by_edit(table, "any", "distinct")
    n = any_found.count().to_numpy()
    summary["any"] = any_found.sum().astype(int).to_numpy()
    crossed = Crossed(cells_of(table))
    low, high = interval(crossed.means(_varying(any_found)))
    summary["any_lo"], summary["any_hi"] = np.clip(low, 0, 1) * n, np.clip(high, 0, 1) * n
    summary["distinct"] = distinct.mean().to_numpy()
    ends = interval(crossed.means(_varying(distinct)), positive=True)
    summary["distinct_lo"], summary["distinct_hi"] = ends
    summary["n"] = n
    return summary


def _varying(values: pd.DataFrame) -> Floats:
    """The values, without the columns in which all are the same."""
    return np.where(values.nunique().to_numpy() > 1, values.to_numpy(dtype=float), np.nan)


def marker_contrasts(table: pd.DataFrame) -> pd.DataFrame:
    """The difference that an edit makes to the markers, paired by cell.

    ``difference`` is the mean over the ``n`` cells of condition - control, for the ``measure``
    ``any`` (share of texts with a marker) or ``distinct`` (distinct markers in a text), ``lo`` and
    ``hi`` its 95 % interval, which holds for all rows at once, and ``verdict`` what that decides
    (`verdicts`, without a margin). Where both are edits they are of the same layer.
    """
    edits, found = wide_by_edit(table, "any", "distinct")
    rows, differences = [], []
    for i, subject in edits.iterrows():
        for j, control in edits.iterrows():
            if control["condition"] not in MARKER_CONTROLS.get(subject["condition"], ()):
                continue
            if control["layers"] not in (NO_LAYERS, subject["layers"]):
                continue
            for measure, wide in zip(("any", "distinct"), found, strict=True):
                paired = (wide[i] - wide[j]).to_numpy(dtype=float)
                differences.append(paired)
                rows.append(
                    {
                        **{name: subject[name] for name in ("condition", "position", "layers")},
                        "control": control["condition"],
                        "measure": measure,
                        "n": int(np.isfinite(paired).sum()),
                        "difference": np.nanmean(paired) if np.isfinite(paired).any() else np.nan,
                    }
                )
    columns = ["condition", "position", "layers", "control", "measure"]
    contrasts = pd.DataFrame(rows, columns=[*columns, "n", "difference"])
    cells = cells_of(table)
    every = np.stack(differences, axis=1) if differences else np.empty((len(cells), 0))
    low, high = simultaneous(Crossed(cells).means(every))
    # A share of texts changes by 1 at most.
    most = np.where(contrasts["measure"] == "any", 1.0, np.inf)
    contrasts["lo"], contrasts["hi"] = np.clip(low, -most, most), np.clip(high, -most, most)
    contrasts["verdict"] = verdicts(low, high)
    return contrasts
