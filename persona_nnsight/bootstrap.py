"""Bootstrap intervals over the cells of a grid (percentile method).

Cells are drawn with replacement, the same draw for every column of a table, so that differences
and shares between columns are paired. The cells of a grid share personas and tasks and are not
independent: the intervals say how much a number hangs on the choice of cells within this grid, and
nothing about other personas, tasks or models.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Ends of the interval, in percent of the draws.
LEVEL = (2.5, 97.5)

_DRAWS = 2000
_SEED = 0
#: Fewer values than this span no interval worth the name.
_MIN_CELLS = 5


def drawn_medians(values: Floats) -> Floats:
    """The median of every column in every draw.

    Args:
        values: float64 [cells, columns]; NaN where a cell has no value.

    Returns:
        float64 [draws, columns]; NaN throughout where fewer than five cells have a value.
    """
    rows, median = _draws(len(values)), np.empty((_DRAWS, values.shape[1]))
    for column, value in enumerate(values.T):
        present = np.isfinite(value)
        if present.sum() < _MIN_CELLS:
            median[:, column] = np.nan
        elif present.all():
            median[:, column] = np.median(value[rows], axis=1)
        else:
            median[:, column] = np.nanmedian(value[rows], axis=1)
    return median


def drawn_means(values: Floats) -> Floats:
    """The mean of every column in every draw; see `drawn_medians`. Every cell has a value."""
    if len(values) < _MIN_CELLS:
        return np.full((_DRAWS, values.shape[1]), np.nan)
    means: Floats = values[_draws(len(values))].mean(axis=1)
    return means


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
