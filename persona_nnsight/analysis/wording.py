"""How shares, layers and verdicts are put into words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from persona_nnsight.analysis.bootstrap import MIN_CELLS
from persona_nnsight.analysis.columns import interval_of
from persona_nnsight.analysis.kl_tables import KL_FLOOR

#: Belongs below the sentences of a run: its cells are no sample of all cells.
CAVEAT = (
    "Intervals and verdicts are over these cells, which share personas and tasks; others may "
    "differ by more."
)

#: More shares than this are not listed one by one.
_MOST_SHARES = 6


def cells_in_words(n: int) -> str:
    """``12 cells``."""
    return f"{n} cell{'' if n == 1 else 's'}"


def shares_in_words(shares: pd.Series[float]) -> str:
    """``88 % (layer 8), 89 % (layers 12 and 16)``, layers in order; of many, the ends alone."""
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


def share_in_words(row: Mapping[str, Any], name: str) -> str:
    """``23 % (18 to 30)``: a share with its interval, where it has one."""
    share, low, high = (100 * row[column] for column in (name, *interval_of(name)))
    if math.isnan(low):
        return f"{round(share)} %"
    return f"{round(share)} % ({round(low)} to {round(high)})"


def side_of_zero(contrast: Mapping[str, Any]) -> int:
    """-1 where the interval of a difference lies below 0, 1 above, 0 around it.

    Differences below `KL_FLOOR` are rounding.
    """
    return -1 if contrast["hi"] < -KL_FLOOR else 1 if contrast["lo"] > KL_FLOOR else 0


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
