"""Bootstrap intervals over the cells of a grid (percentile method).

Cells are drawn with replacement, the same draw for every column of a table, so that differences
and shares between columns are paired. The cells of a grid share personas and tasks and are not
independent: the intervals say how much a number hangs on the choice of cells within this grid, and
nothing about other personas, tasks or models.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Ends of the interval, in percent of the draws.
LEVEL = (2.5, 97.5)

_DRAWS = 2000
_SEED = 0
#: Fewer values than this span no interval worth the name.
MIN_CELLS = 5


def drawn_medians(values: Floats) -> Floats:
    """The median of every column in every draw.

    Args:
        values: float64 [cells, columns]; NaN where a cell has no value.

    Returns:
        float64 [draws, columns]; NaN throughout where fewer than five cells have a value.
    """
    return _drawn(values, np.median, np.nanmedian)


def drawn_means(values: Floats) -> Floats:
    """The mean of every column in every draw; see `drawn_medians`."""
    return _drawn(values, np.mean, np.nanmean)


def _drawn(
    values: Floats, statistic: Callable[..., Floats], skipping_nan: Callable[..., Floats]
) -> Floats:
    rows, found = _draws(len(values)), np.full((_DRAWS, values.shape[1]), np.nan)
    for column, value in enumerate(values.T):
        present = np.isfinite(value)
        if present.all() and len(value) >= MIN_CELLS:
            found[:, column] = statistic(value[rows], axis=1)
        elif present.sum() >= MIN_CELLS:
            drawn = present[rows].any(axis=1)  # a draw may hold none of the cells with a value
            found[drawn, column] = skipping_nan(value[rows[drawn]], axis=1)
    return found


def interval(draws: Floats) -> tuple[Floats, Floats]:
    """Lower and upper end of the 95 % interval of every column, each float64 [columns]."""
    low, high = np.full((2, draws.shape[1]), np.nan)
    known = np.isfinite(draws).any(axis=0)
    if known.any():
        low[known], high[known] = np.nanpercentile(draws[:, known], LEVEL, axis=0)
    return low, high


def _draws(n: int) -> NDArray[np.int64]:
    """Indices of the drawn cells, [draws, n]; the same whenever n is the same."""
    return np.random.default_rng(_SEED).integers(n, size=(_DRAWS, n))
