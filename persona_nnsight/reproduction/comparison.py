"""Our numbers beside the published ones."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from persona_nnsight.analysis.geometry_tables import RATIOS, geometry_summary
from persona_nnsight.analysis.kl_tables import kl_summary
from persona_nnsight.experiments.results import Result
from persona_nnsight.method.sites import NO_LAYERS
from persona_nnsight.reproduction.protocol import PaperTable, has_paper_stimuli, reference_layers
from persona_nnsight.reproduction.published import REFERENCE_MODEL, paper_model, published

_KEYS = ["position", "layers", "condition", "persona", "task", "measure"]


def comparison(table: PaperTable, result: Result) -> pd.DataFrame:
    """One row per number of a table, ours beside the paper's where it has one.

    Columns: ``position``, ``layers``, ``condition``, ``persona``, ``task`` (empty for all cells),
    ``measure``; our ``value`` (see `persona_nnsight.reproduction.published` for what it is), its
    95 % interval ``lo``, ``hi`` by itself, the quartiles ``q25``, ``q75`` over cells, ``floor``,
    ``recovered`` or ``gap_closed`` with its interval and pooled, ``n``; then ``published_model``,
    ``published_dtype``, ``published_layers`` (as deep in that model), ``published``,
    ``published_q25``, ``published_q75``, ``same_stimuli`` (whether the cells have the texts of the
    paper's), and
    ``difference`` = ours - theirs, which is empty unless the model is the published one.
    """
    ours = _OURS[table.name](result)
    model_id = result.model.weights.model_id
    named = paper_model(model_id)
    model = named if named and len(published(table.name, named)) else REFERENCE_MODEL
    same = model == named
    place = None if same else reference_layers(table.name, result.model.tree.n_layers)
    ours = ours.merge(_aligned(published(table.name, model), place), on=_KEYS, how="left")
    ours["published_layers"] = ours["published_layers"].fillna("")
    ours["published_model"] = model
    ours["published_dtype"] = published(table.name, model)["dtype"].iloc[0]
    ours["same_stimuli"] = has_paper_stimuli(table.grid, table.name)
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
    table = result.frame()
    parts = [_named(result.summary())]
    for group in ("persona", "task") if by_group else ():
        for name, cells in table.groupby(group, sort=False):
            summary = _named(kl_summary(cells))
            additive = summary[summary["condition"] == "additive"]
            parts.append(additive.assign(**{group: name}))
    both = pd.concat(parts, ignore_index=True).assign(measure="kl")
    return _with_keys(pd.concat([both, _geometry(result)], ignore_index=True))


def _geometry(result: Result) -> pd.DataFrame:
    table, summary = result.geometry, geometry_summary(result.geometry)
    grouped = table.groupby(["position", "layer"], sort=False)
    parts = []
    for name in (ratio for ratio in RATIOS if ratio in table):
        parts.append(
            pd.DataFrame(
                {
                    "position": summary["position"],
                    "layers": summary["layer"].astype(str),
                    "measure": name,
                    "value": summary[name],
                    "lo": summary[f"{name}_lo"],
                    "hi": summary[f"{name}_hi"],
                    "q25": grouped[name].quantile(0.25).to_numpy(),
                    "q75": grouped[name].quantile(0.75).to_numpy(),
                    "n": summary["n"],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _named(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary of KLs with the names of the comparison."""
    names = {"median": "value", "median_lo": "lo", "median_hi": "hi"}
    return summary.rename(columns=names).drop(columns=["host", "min", "max"])


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
    return _with_keys(_named(result.summary()).assign(measure="kl"))


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
