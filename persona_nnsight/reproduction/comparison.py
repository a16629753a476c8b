"""Our numbers beside the published ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from persona_nnsight.reproduction.protocol import Study, has_paper_stimuli, reference_layers
from persona_nnsight.reproduction.published import REFERENCE_MODEL, paper_model, published
from persona_nnsight.results import Result
from persona_nnsight.sites import NO_LAYERS

_KEYS = ["position", "layers", "condition", "persona", "task", "measure"]
_RATIOS = ("cos_xy_sum", "cos_x_y", "inter_over_xy", "inter_over_xy_normed")


def comparison(study: Study, result: Result) -> pd.DataFrame:
    """One row per number of a table, ours beside the paper's where it has one.

    Columns: ``position``, ``layers``, ``condition``, ``persona``, ``task`` (empty for all cells),
    ``measure``; our ``value`` (see `persona_nnsight.reproduction.published` for what it is), its
    bootstrap 95 % interval ``lo``, ``hi``, the quartiles ``q25``, ``q75`` over cells, ``recovered``
    or ``gap_closed``, ``n``; then ``published_model``, ``published_layers`` (as deep in that
    model), ``published``, ``published_q25``, ``published_q75``, ``same_stimuli`` (whether the cells
    have the texts of the paper's), and ``difference`` = ours - theirs, which is empty unless the
    model is the published one.
    """
    ours = _OURS[study.table](result)
    model_id = result.model.weights.model_id
    named = paper_model(model_id)
    model = named if named and len(published(study.table, named)) else REFERENCE_MODEL
    same = model == named
    place = None if same else reference_layers(study.table, result.model.tree.n_layers)
    ours = ours.merge(_aligned(published(study.table, model), place), on=_KEYS, how="left")
    ours["published_layers"] = ours["published_layers"].fillna("")
    ours["published_model"] = model
    ours["same_stimuli"] = has_paper_stimuli(
        study.grid, "short" if study.table == "table1" else "long"
    )
    ours["difference"] = ours["value"] - ours["published"] if same else float("nan")
    return ours


def _aligned(theirs: pd.DataFrame, place: dict[str, str] | None) -> pd.DataFrame:
    """The published rows under our layers; None where the layers are the same."""
    ours = theirs["layers"] if place is None else theirs["layers"].map(place)
    theirs = theirs.assign(published_layers=theirs["layers"], layers=ours).rename(
        columns={"value": "published", "q25": "published_q25", "q75": "published_q75"}
    )
    columns = [*_KEYS, "published_layers", "published", "published_q25", "published_q75"]
    # In a model of few layers several published depths may fall on one.
    return theirs[columns].drop_duplicates(_KEYS)


def _substitution(result: Result, *, by_group: bool) -> pd.DataFrame:
    summary = result.summary().rename(columns={"median": "value", "median_lo": "lo"})
    summary = summary.rename(columns={"median_hi": "hi"})
    kl = summary.drop(columns=["host", "min", "max", "recovered_lo", "recovered_hi"])
    parts = [kl]
    table = result.frame()
    additive = table[table["condition"] == "additive"]
    for group in ("persona", "task") if by_group else ():
        grouped = additive.groupby([group, "position", "layers"], sort=False)["kl"]
        quartiles = grouped.quantile(np.array([0.25, 0.5, 0.75])).unstack()
        quartiles.columns = ["q25", "value", "q75"]
        parts.append(quartiles.assign(n=grouped.count()).reset_index().assign(condition="additive"))
    both = pd.concat(parts, ignore_index=True).assign(measure="kl")
    return _with_keys(pd.concat([both, _geometry(result)], ignore_index=True))


def _geometry(result: Result) -> pd.DataFrame:
    table = result.geometry
    grouped = table.groupby(["position", "layer"], sort=False)
    parts = []
    for name in (ratio for ratio in _RATIOS if ratio in table):
        quartiles = grouped[name].quantile(np.array([0.25, 0.5, 0.75])).unstack()
        quartiles.columns = ["q25", "value", "q75"]
        parts.append(quartiles.assign(n=grouped[name].count(), measure=name).reset_index())
    geometry = pd.concat(parts, ignore_index=True)
    return geometry.assign(layers=geometry["layer"].astype(str)).drop(columns="layer")


def _marker_counts(result: Result) -> pd.DataFrame:
    summary = result.summary()
    parts = [
        summary[["condition", "position", "layers", "n"]].assign(
            measure=measure,
            value=summary[measure],
            lo=summary[f"{measure}_lo"],
            hi=summary[f"{measure}_hi"],
        )
        for measure in ("any", "distinct")
    ]
    table = pd.concat(parts, ignore_index=True)
    # Where nothing is written there is no site, as in the published table.
    unedited = table["layers"] == NO_LAYERS
    return _with_keys(table.assign(**{c: table[c].mask(unedited, "") for c in _KEYS[:2]}))


def _injection(result: Result) -> pd.DataFrame:
    summary = result.summary().drop(columns=["host", "min", "max"])
    names = {"median": "value", "median_lo": "lo", "median_hi": "hi"}
    return _with_keys(summary.rename(columns=names).assign(measure="kl"))


def _with_keys(table: pd.DataFrame) -> pd.DataFrame:
    """All key columns, empty where a row has none, before the numbers."""
    table = table.reindex(columns=[*_KEYS, *(name for name in table if name not in _KEYS)])
    table[_KEYS] = table[_KEYS].fillna("")
    return table


_OURS: dict[str, Callable[[Result], pd.DataFrame]] = {
    "table1": lambda result: _substitution(result, by_group=False),
    "table2": lambda result: _substitution(result, by_group=True),
    "table3": _marker_counts,
    "table4": _injection,
}
