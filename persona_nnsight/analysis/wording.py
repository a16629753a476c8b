"""How shares, layers and verdicts are put into words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from persona_nnsight.analysis.columns import SITE, cells_of, interval_of
from persona_nnsight.analysis.kl_tables import KL_FLOOR, drawn_kls
from persona_nnsight.analysis.resampling import MIN_CELLS, Crossed, Resampling, combined
from persona_nnsight.analysis.verdicts import EQUIVALENT, HIGHER, LOWER, UNDECIDED, best_of

#: What the verdict of a contrast of KLs says of a condition, before the name of its control.
COSTS = {
    LOWER: "costs less than",
    HIGHER: "costs more than",
    EQUIVALENT: "is as good as",
    UNDECIDED: "is undecided against",
}

#: More shares than this are not listed one by one.
_MOST_SHARES = 6
#: A pooled share is told where it is further than this from the median over cells.
_APART = 0.05


def resampling_of(tables: Mapping[str, pd.DataFrame]) -> Resampling | None:
    """What is drawn for the intervals of a run; None where no table of it names its cells."""
    for name in ("kl", "markers", "geometry"):
        if name in tables and len(tables[name]):
            return Crossed(cells_of(tables[name]), draws=1).resampling
    return None


def caveat(tables: Mapping[str, pd.DataFrame]) -> str:
    """Of what the sentences of a run speak; it belongs below them."""
    resampling = resampling_of(tables)
    if resampling is None:
        return "Intervals and verdicts are over the cells of this run."
    if not resampling.scope:
        return (
            f"Intervals and verdicts allow for other personas and tasks ({resampling.method}); "
            "other models may differ."
        )
    return (
        f"Intervals and verdicts are of {resampling.scope} only, too few to speak of others "
        f"({resampling.method})."
    )


def ties(margins: Iterable[float | None]) -> Iterable[str]:
    """In how many cells the clean continuation passes a tie, if in any.

    Args:
        margins: the smallest gap between the two largest logits, by cell; None where unknown.
    """
    known = [margin for margin in margins if margin is not None]
    tied = sum(margin == 0 for margin in known)
    if tied:
        yield (
            f"In {tied} of {cells_in_words(len(known))} a token of the clean continuation ties "
            "with another (their logits are equal), and the one with the lower id was taken."
        )


def cells_in_words(n: int) -> str:
    """``12 cells``."""
    return f"{n} cell{'' if n == 1 else 's'}"


def shares_in_words(rows: pd.DataFrame, name: str, of: str) -> str:
    """``88 % (layer 8), 89 % (layers 12 and 16) of … (medians over cells)``, layers in order.

    Of many, the ends alone. Pooled shares follow where they are others.

    Args:
        rows: of a summary, by layer.
        name: of the share.
        of: what it is of.
    """
    rows = rows[rows[name].notna()]
    shares = rows[name]
    statistic = f"median{'s' if len(shares) > 1 else ''} over cells"
    if f"{name}_pooled" in rows:  # not in older tables
        pooled = rows[f"{name}_pooled"]
        apart = pooled[((pooled - shares).abs() > _APART).to_numpy()]
        if len(apart):
            statistic += f"; pooled {_by_layer(apart)}"
    return f"{_by_layer(shares)} {of} ({statistic})"


def _by_layer(shares: pd.Series[float]) -> str:
    percents = shares.map(lambda share: f"{round(100 * share)} %")
    found = [
        f"{percent} ({layers_in_words(layers.index)})"
        for percent, layers in percents.groupby(percents, sort=False)
    ]
    if len(found) <= _MOST_SHARES:
        return ", ".join(found)
    ends = (str(shares.idxmin()), str(shares.idxmax()))
    low, high = (f"{percents[layer]} (layer {layer})" for layer in ends)
    return f"between {low} and {high}"


def share_in_words(
    row: Mapping[str, Any], name: str, of: str, *, with_interval: bool = True
) -> str:
    """``23 % (18 to 30) of … (median over cells; pooled 40 %)``.

    Args:
        row: of a summary.
        name: of the share.
        of: what it is of.
        with_interval: that of the share by itself, which is not that of the best of several.
    """
    share, low, high = (100 * row[column] for column in (name, *interval_of(name)))
    ends = f" ({round(low)} to {round(high)})" if with_interval and not math.isnan(low) else ""
    pooled = 100 * row.get(f"{name}_pooled", math.nan)
    beside = f"; pooled {round(pooled)} %" if abs(pooled - share) > 100 * _APART else ""
    return f"{round(share)} %{ends} {of} (median over cells{beside})"


def best_in_words(
    kl: pd.DataFrame | None, row: Mapping[str, Any], several: str, *, lowest_kl: bool = False
) -> str:
    """``, the best of 3 sets, an interval that allows for the choice: 13 to 33 %``.

    Args:
        kl: the KLs of the run; without them nothing is said about an interval.
        row: of the summary: the best, among the edits of its condition with its β.
        several: what it was chosen from.
        lowest_kl: whether it was chosen for its median KL, and not for its share.
    """
    words = f", the best of {several}"
    if kl is None or not {"host", *({"alpha", "beta"} & set(row))} <= set(kl):
        return words  # a run of an older version, or cut by hand
    edits, medians, shares = drawn_kls(kl)
    among = edits["condition"] == row["condition"]
    if "beta" in edits:
        among &= edits["beta"] == row["beta"]
    columns = np.flatnonzero(among)
    negative = combined(lambda value: -value, medians.take(columns))
    best = best_of(shares.take(columns), by=negative if lowest_kl else None)
    if best is None:
        return words
    found = edits.iloc[columns[best.column]]
    if any(found[name] != row[name] for name in (*SITE, "alpha") if name in found):
        return words  # the best has too few cells for an interval
    low, high = (round(100 * min(end, 1.0)) for end in (best.low, best.high))
    return f"{words}, an interval that allows for the choice: {low} to {high} %"


def verdict_of(contrast: Mapping[str, Any]) -> str:
    """What the interval of a difference decides; older tables have the interval alone.

    Differences below `KL_FLOOR` are rounding.
    """
    if "verdict" in contrast:
        return str(contrast["verdict"])
    if contrast["hi"] < -KL_FLOOR:
        return LOWER
    return HIGHER if contrast["lo"] > KL_FLOOR else UNDECIDED


def margin_in_words(contrast: Mapping[str, Any], of: float | None, owner: str) -> str:
    """`` (within ± 10 % of h_BB's KL)``.

    Args:
        contrast: of which the verdict is that it is within the margin.
        of: the KL that the margin is a share of, in nats.
        owner: whose it is.
    """
    margin = contrast.get("margin", math.nan)
    if math.isnan(margin):  # a table that was cut by hand
        return ""
    if of is None or not of > 0:
        return f" (within ± {margin:.2g} nats)"
    return f" (within ± {100 * margin / of:.3g} % of {owner}'s KL)"


def layers_in_words(names: Iterable[str]) -> str:
    """``layer 8``, ``layers 8 and 12``, ``layers 4 to 9 and 12``."""
    runs: list[list[str]] = []
    for name in names:
        before = runs[-1][-1] if runs else ""
        follows = before.isdigit() and name == str(int(before) + 1)
        runs[-1].append(name) if follows else runs.append([name])
    found: list[str] = []
    for run in runs:
        found += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
    several = len(found) > 1 or " to " in found[0]
    return f"layer{'s' if several else ''} {listed(found)}"


def listed(items: list[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def few_cells(summary: pd.DataFrame) -> Iterable[str]:
    """That the cells of a run are too few for intervals, where they are."""
    column = next(name for name in ("median_lo", "distinct_lo") if name in summary)
    n = int(summary["n"].max())
    if n < MIN_CELLS and summary[column].isna().all():
        verb = "is" if n == 1 else "are"
        yield f"{cells_in_words(n)} {verb} too few for intervals; expect other cells to differ."
