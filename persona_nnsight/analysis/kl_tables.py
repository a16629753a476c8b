"""Results as tidy tables: one row per observation, and their summaries over cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from persona_nnsight.analysis.bootstrap import Floats, drawn_means, drawn_medians, interval
from persona_nnsight.method.conditions import HOST, STEER
from persona_nnsight.method.marker_words import distinct_markers
from persona_nnsight.method.sites import NO_LAYERS, format_layers, format_positions

if TYPE_CHECKING:
    from torch import Tensor

    from persona_nnsight.plan.events import Scored
    from persona_nnsight.plan.plan import Edit, Plan
    from persona_nnsight.prompts.grids import Grid

#: KLs below this, in nats, are rounding: a share of them means nothing and is left empty.
KL_FLOOR = 1e-5

#: The measures of geometry that are summarised.
RATIOS = ("cos_xy_sum", "cos_x_y", "inter_over_xy", "inter_over_xy_normed")

#: How `contrasts` calls a steering without Δ_X (α = 0).
NO_PERSONA = "alpha_0"

_CELL = ["persona", "task"]
_SITE = ["host", "position", "layers"]
_FACTORS = ["alpha", "beta"]


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


def geometry_table(
    plan: Plan, cells: Sequence[int], measures: Mapping[str, Tensor]
) -> pd.DataFrame:
    """One row per cell and site: the columns of `persona_nnsight.method.geometry.decompose`.

    ``inter_over_xy_normed`` is ``inter_over_xy`` after the layer's input norm; the column is
    missing for architectures without one.

    Args:
        plan: the plan that was run.
        cells: which of the plan's cells the measures belong to.
        measures: by name, float32 [cells, positions, layers].
    """
    shape = (len(cells), len(plan.positions), len(plan.layers))
    if not measures:
        return pd.DataFrame(columns=[*_CELL, "position", "layer"])
    cell, position, layer = (index.ravel() for index in np.indices(shape))
    return pd.DataFrame(
        {
            "persona": [plan.cells[cells[i]].persona for i in cell],
            "task": [plan.cells[cells[i]].task for i in cell],
            "position": [plan.positions[i] for i in position],
            "layer": np.asarray(plan.layers)[layer],
            **{name: value.numpy().ravel().astype(float) for name, value in measures.items()},
        }
    )


def geometry_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over cells of the `RATIOS`, one row per site, with ``n`` cells.

    ``…_lo`` and ``…_hi`` are bootstrap 95 % intervals of the medians.
    """
    ratios = [name for name in RATIOS if name in table]
    site = table.groupby(["position", "layer"], sort=False)
    cell = table.groupby(_CELL, sort=False).ngroup()
    summary = table[["position", "layer"]].drop_duplicates(ignore_index=True)
    for name in ratios:
        wide = table[name].set_axis([cell, site.ngroup()]).unstack()
        summary[name] = wide.median().to_numpy()
        ends = interval(drawn_medians(wide.to_numpy(dtype=float)))
        summary[f"{name}_lo"], summary[f"{name}_hi"] = ends
    summary["n"] = site["cos_xy_sum"].count().to_numpy()
    return summary


def kl_table(plan: Plan, scores: Iterable[Scored]) -> pd.DataFrame:
    """One row per cell and edit, in the plan's order: KL in nats, summed over ``n_tokens``.

    ``alpha`` and ``beta`` are there for a steering alone. Runs into the BY host add
    ``gap_closed`` = 1 - KL / KL of the unedited host, cell by cell (empty where the host's KL is
    below `KL_FLOOR`: there is no gap).
    """
    found = sorted(scores, key=lambda score: (score.cell, score.edit))
    described = [
        {
            "condition": edit.condition,
            "host": edit.host,
            "position": format_positions(edit.positions),
            "layers": format_layers(edit.layers),
            **factors_of(edit),
        }
        for edit in plan.edits
    ]
    edits = [edit for edit in plan.edits if edit.scored]
    columns = [*_CELL, "condition", *_SITE]
    if any(edit.condition == STEER for edit in edits):
        columns += _FACTORS
    # By column: a dictionary per row would take more memory than all else of a large grid.
    table = pd.DataFrame(
        {
            "persona": [plan.cells[score.cell].persona for score in found],
            "task": [plan.cells[score.cell].task for score in found],
            **{
                name: [described[score.edit][name] for score in found]
                for name in columns
                if name not in _CELL
            },
            "kl": [score.kl for score in found],
            "n_tokens": [score.n_tokens for score in found],
        }
    )
    if any(edit.host == "BY" for edit in edits):
        host = table[table["condition"] == HOST].set_index(_CELL)["kl"].rename("of")
        table["gap_closed"] = _share(table["kl"], table.join(host, on=_CELL)["of"])
    return table


def factors_of(edit: Edit) -> dict[str, float | None]:
    """α and β of an edit by column name; None unless it steers."""
    steers = edit.condition == STEER
    return {"alpha": edit.alpha if steers else None, "beta": edit.beta if steers else None}


def kl_summary(table: pd.DataFrame) -> pd.DataFrame:
    """KL over cells, one row per edit: median with its interval, quartiles, extremes.

    ``n`` counts the cells that have a window at all; ``median_lo`` and ``median_hi`` are the
    bootstrap 95 % interval of the median (`bootstrap`), empty below five cells.
    A substitution's ``recovered`` is 1 - median KL / median KL of condition ``bb`` at the same
    site; empty without that condition, where an interrupted run has it in other cells, or where
    its median is below `KL_FLOOR`: there is nothing to recover. An injection's ``gap_closed`` is
    the median over cells. Both with intervals.
    """
    summary, (wide,) = _wide(table, "kl")
    draws = drawn_medians(wide.to_numpy())
    summary["median"] = wide.median().to_numpy()
    summary["median_lo"], summary["median_hi"] = interval(draws)
    summary["q25"], summary["q75"] = wide.quantile([0.25, 0.75]).to_numpy()
    summary["min"], summary["max"] = wide.min().to_numpy(), wide.max().to_numpy()
    summary["n"] = wide.count().to_numpy()
    if "gap_closed" in table:
        _, (closed,) = _wide(table, "gap_closed")
        summary["gap_closed"] = closed.median().to_numpy()
        ends = interval(drawn_medians(closed.to_numpy()))
        summary["gap_closed_lo"], summary["gap_closed_hi"] = ends
    if (summary["host"] == "XY").any():
        neither, n = _control_columns(summary, "bb"), summary["n"].tolist()
        summary["recovered"] = _recovered(summary["median"].to_numpy()[None], neither, n)[0]
        ends = interval(_recovered(draws, neither, n))
        summary["recovered_lo"], summary["recovered_hi"] = ends
    return summary


def contrasts(table: pd.DataFrame) -> pd.DataFrame:
    """The difference that a condition makes from its controls, paired by cell.

    At every site of XY ``additive`` is set against every other condition but ``clean`` and
    ``steer`` against ``bb``; in BY everything is set against the unedited ``host``. A ``steer`` is
    also set against α = 0 with the same β, under the name ``alpha_0``. ``difference``
    is the median over cells of KL(condition) - KL(control), in nats, ``lo`` and ``hi`` its
    bootstrap 95 % interval, ``lower`` the number of the ``n`` cells in which the condition's KL is
    below the control's by more than `KL_FLOOR`.
    """
    edits, (wide,) = _wide(table, "kl")
    kl = wide.to_numpy()
    rows = records(edits)
    pairs = [
        (i, j)
        for i, subject in enumerate(rows)
        for j, control in enumerate(rows)
        if _are_contrasted(subject, control)
    ]
    subjects, controls = ([pair[side] for pair in pairs] for side in (0, 1))
    differences = kl[:, subjects] - kl[:, controls]
    found = edits.loc[subjects, [name for name in edits if name != "condition"]].reset_index(
        drop=True
    )
    found["condition"] = edits["condition"].to_numpy()[subjects]
    names = edits["condition"].where(edits["condition"] != STEER, NO_PERSONA)
    found["control"] = names.to_numpy()[controls]
    frame = pd.DataFrame(differences)
    found["n"] = frame.count().to_numpy()
    found["difference"] = frame.median().to_numpy()
    found["lo"], found["hi"] = interval(drawn_medians(differences))
    found["lower"] = (frame < -KL_FLOOR).sum().to_numpy()
    return found


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
                **{name: getattr(text, name) for name in (*_CELL, "condition")},
                "position": text.position or NO_LAYERS,
                "layers": text.layers or NO_LAYERS,
                **{name: getattr(text, name) for name in _FACTORS},
                "any": bool(hits),
                "distinct": len(hits),
                "hits": "; ".join(hits),
            }
        )
    table = pd.DataFrame(
        rows,
        columns=[
            *(*_CELL, "condition", "position", "layers", *_FACTORS),
            *("any", "distinct", "hits"),
        ],
    )
    return table if table["alpha"].notna().any() else table.drop(columns=_FACTORS)


def marker_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Markers over cells, one row per edit, with bootstrap 95 % intervals.

    ``any`` counts the cells whose text has a marker, ``distinct`` is the mean number of distinct
    markers in a text, ``n`` the number of cells. Where all cells are the same the draws are too,
    and the interval is left empty.
    """
    summary, (any_found, distinct) = _wide(table, "any", "distinct")
    n = any_found.count().to_numpy()
    summary["any"] = any_found.sum().astype(int).to_numpy()
    low, high = interval(drawn_means(_varying(any_found)))
    summary["any_lo"], summary["any_hi"] = low * n, high * n
    summary["distinct"] = distinct.mean().to_numpy()
    ends = interval(drawn_means(_varying(distinct)))
    summary["distinct_lo"], summary["distinct_hi"] = ends
    summary["n"] = n
    return summary


def _varying(values: pd.DataFrame) -> Floats:
    """The values, without the columns in which all are the same."""
    return np.where(values.nunique().to_numpy() > 1, values.to_numpy(dtype=float), np.nan)


#: Which conditions of `markers` are set against each other.
_MARKER_CONTRASTS = (
    ("additive", "clean"),
    ("remove_x", "clean"),
    ("remove_x", "additive"),
    ("bare", "clean"),
)


def marker_contrasts(table: pd.DataFrame) -> pd.DataFrame:
    """The difference that an edit makes to the markers, paired by cell.

    ``difference`` is the mean over the ``n`` cells of condition - control, for the ``measure``
    ``any`` (share of texts with a marker) or ``distinct`` (distinct markers in a text), ``lo`` and
    ``hi`` its bootstrap 95 % interval. Where both are edits they are of the same layer.
    """
    edits, found = _wide(table, "any", "distinct")
    rows = []
    for i, subject in edits.iterrows():
        for j, control in edits.iterrows():
            if (subject["condition"], control["condition"]) not in _MARKER_CONTRASTS:
                continue
            if control["layers"] not in (NO_LAYERS, subject["layers"]):
                continue
            for measure, wide in zip(("any", "distinct"), found, strict=True):
                paired = (wide[i] - wide[j]).dropna().to_numpy()[:, None]
                (low,), (high,) = interval(drawn_means(paired))
                rows.append(
                    {
                        **{name: subject[name] for name in ("condition", "position", "layers")},
                        "control": control["condition"],
                        "measure": measure,
                        "n": len(paired),
                        "difference": paired.mean(),
                        "lo": low,
                        "hi": high,
                    }
                )
    columns = ["condition", "position", "layers", "control", "measure"]
    return pd.DataFrame(rows, columns=[*columns, "n", "difference", "lo", "hi"])


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain mappings."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _wide(table: pd.DataFrame, *values: str) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """The edits of a table, and for each of `values` a table of cells down and edits across.

    Cells and edits keep the order in which the table first names them.
    """
    edit = [name for name in ("condition", *_SITE, *_FACTORS) if name in table]
    edits = table[edit].drop_duplicates(ignore_index=True)
    across = table.groupby(edit, sort=False, dropna=False).ngroup()
    down = table.groupby(_CELL, sort=False).ngroup()
    return edits, [
        table[value].astype(float).set_axis([down, across]).unstack() for value in values
    ]


def _control_columns(edits: pd.DataFrame, control: str) -> list[int | None]:
    """For every edit of XY, which edit is the control at the same site; None without one."""
    place = {
        tuple(site): index
        for index, (name, *site) in enumerate(edits[["condition", *_SITE]].itertuples(index=False))
        if name == control
    }
    sites = edits[_SITE].itertuples(index=False)
    return [place.get(tuple(site)) if site.host == "XY" else None for site in sites]


def _recovered(medians: Floats, neither: Sequence[int | None], n: Sequence[int]) -> Floats:
    """1 - median / median of the control, [draws, edits]; empty where they have other cells."""
    shares = np.full_like(medians, np.nan)
    for column, control in enumerate(neither):
        if control is not None and n[column] == n[control]:
            of = medians[:, control]
            with np.errstate(divide="ignore", invalid="ignore"):
                share = 1 - medians[:, column] / of
            shares[:, column] = np.where(of >= KL_FLOOR, share, np.nan)
    return shares


def _are_contrasted(subject: Mapping[str, Any], control: Mapping[str, Any]) -> bool:
    """Whether one edit is set against another; see `contrasts`."""
    if subject["host"] != control["host"]:
        return False
    at_one_site = all(bool(subject[name] == control[name]) for name in _SITE)
    pair = (subject["condition"], control["condition"])
    if pair == (STEER, STEER):
        leaves_x_out = subject["alpha"] != 0 and control["alpha"] == 0
        return at_one_site and leaves_x_out and bool(subject["beta"] == control["beta"])
    if pair[0] == pair[1]:
        return False
    if subject["host"] == "BY":
        return bool(pair[1] == HOST)
    if pair[0] == STEER:
        return at_one_site and bool(pair[1] == "bb")
    return at_one_site and bool(pair[0] == "additive" and pair[1] != "clean")


def _share(kl: pd.Series[float], of: pd.Series[float]) -> pd.Series[float]:
    """1 - kl / of, empty where `of` is too small to be divided by."""
    return 1 - kl / of.where(of >= KL_FLOOR)
