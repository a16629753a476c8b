"""Bootstrap intervals over the cells of a grid (percentile method).

Cells are drawn with replacement, the same draw for every column of a table, so that differences
and shares between columns are paired. The cells of a grid share personas and tasks and are not
independent: the intervals say how much a number hangs on the choice of cells within this grid, and
nothing about other personas, tasks or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Ends of the interval, in percent of the draws.
LEVEL = (2.5, 97.5)

_DRAWS = 2000
_SEED = 0
#: Indices that are in memory at a time.
_BLOCK = 1 << 20
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
    found = np.full((_DRAWS, values.shape[1]), np.nan)
    present = np.isfinite(values)
    known = present.sum(axis=0)
    for block, rows in _draws(len(values)):
        for column in np.flatnonzero(known >= MIN_CELLS):
            value = values[:, column]
            if known[column] == len(values):
                found[block, column] = statistic(value[rows], axis=1)
            else:
                # A draw may hold none of the cells with a value.
                drawn = np.flatnonzero(np.isfinite(value[rows]).any(axis=1))
                found[block.start + drawn, column] = skipping_nan(value[rows[drawn]], axis=1)
    return found


def interval(draws: Floats) -> tuple[Floats, Floats]:
    """Lower and upper end of the 95 % interval of every column, each float64 [columns]."""
    low, high = np.full((2, draws.shape[1]), np.nan)
    known = np.isfinite(draws).any(axis=0)
    if known.any():
        low[known], high[known] = np.nanpercentile(draws[:, known], LEVEL, axis=0)
    return low, high


def _draws(n: int) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Indices of the drawn cells, [draws, n], in blocks; the same whenever n is the same."""
    generator = np.random.default_rng(_SEED)
    size = max(1, _BLOCK // max(n, 1))
    for start in range(0, _DRAWS, size):
        block = slice(start, min(start + size, _DRAWS))
        yield block, generator.integers(n, size=(block.stop - start, n))
