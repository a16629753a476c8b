"""Intervals from the draws of a grid, one by one or for a whole table, and what they decide.

An interval is the estimate with a multiple of its standard error on either side. The standard
error is the root mean square of the draws' distances from the estimate. The multiple is the 95 %
point of what |estimate - truth| / standard error would be were the effects of levels and cells
normal: the numerator has the covariance of the draws, and each factor's part of the squared
standard error is a mean of as many squares as the factor has degrees of freedom, with that
factor's covariance between columns. With one column and one factor of n levels this is Student's t
with n - 1 degrees; with several factors what Satterthwaite's formula approximates; for a table the
95 % point of the largest ratio over its columns, which holds for all of them at once (P. H.
Westfall and S. S. Young, "Resampling-Based Multiple Testing", 1993, the single-step max-T method).

The bootstrap's own distribution is used for standard errors and covariances only: with three tasks
no draw lies beyond them, and the truth does in a quarter of all cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persona_nnsight.analysis.resampling import Counts, Draws, Floats, combined

#: How often an interval, or all those of a table at once, is to hold the truth.
CONFIDENCE = 0.95

LOWER, HIGHER, EQUIVALENT, UNDECIDED = "lower", "higher", "equivalent", "undecided"
#: What a contrast without an interval is told.
NO_VERDICT = ""

_SIMULATIONS = 2000
_SEED = 1
#: With more degrees of freedom the standard error hardly varies, however columns hang together.
_MANY_DEGREES = 30


def interval(draws: Draws, *, positive: bool = False) -> tuple[Floats, Floats]:
    """Lower and upper end of the 95 % interval of every column by itself, each float64 [columns].

    NaN where a column has no draws. Where all draws are the estimate both ends are.

    Args:
        draws: of one statistic.
        positive: whether it is a length, a KL or a ratio of such: the interval is then made of its
            logarithm, unless it is 0 in a draw, and does not go below 0.
    """
    return _ends(draws, together=False, positive=positive)


def simultaneous(draws: Draws, *, positive: bool = False) -> tuple[Floats, Floats]:
    """As `interval`, but all columns' intervals hold the truth at once in 95 % of all tables."""
    return _ends(draws, together=True, positive=positive)


def verdicts(
    low: Floats, high: Floats, *, margin: Floats | float = 0.0, floor: Floats | float = 0.0
) -> NDArray[np.str_]:
    """What the intervals of differences decide, one word each.

    ``equivalent`` where the interval lies within ± `margin`, even where it leaves out 0: the
    margin says which differences do not matter. ``lower`` where it lies below -`floor`, ``higher``
    above `floor`, else ``undecided``; empty without an interval. Given the intervals of
    `simultaneous`, a table holds a false word of these in at most 5 % of all tables.

    Args:
        low: lower ends.
        high: upper ends.
        margin: 0 or NaN allows no equivalence.
        floor: differences up to this are rounding.
    """
    within = (margin > np.zeros_like(low)) & (low >= -margin) & (high <= margin)
    words = [NO_VERDICT, EQUIVALENT, LOWER, HIGHER]
    cases = [np.isnan(low) | np.isnan(high), within, high < -floor, low > floor]
    return np.select(cases, words, UNDECIDED)


@dataclass(frozen=True)
class Best:
    """The best of several columns.

    Attributes:
        column: which.
        estimate: its value, which is too good: it was chosen for it.
        corrected: less what the choice adds in the draws, on average.
        low: lower end of a 95 % interval of the chosen column's true value.
        high: upper end.
        chosen: in which share of the draws it is the best.
    """

    column: int
    estimate: float
    corrected: float
    low: float
    high: float
    chosen: float


def best_of(draws: Draws, *, by: Draws | None = None) -> Best | None:
    """The column with the largest value, with an interval that knows of the choice.

    In every draw the choice is made anew, and the value of the column chosen there is set against
    that column's own estimate: the mean of these differences is what choosing adds, their spread
    the error of a chosen value.

    Args:
        draws: of the value that is reported.
        by: of what the column is chosen for, its largest; the value itself if left out.

    Returns:
        None where no column has draws.
    """
    by = draws if by is None else by
    known = np.flatnonzero(_known(draws) & _known(by))
    if not len(known):
        return None
    draws, by = draws.take(known), by.take(known)
    best = int(by.estimate.argmax())

    def gain(values: Floats, criteria: Floats) -> Floats:
        choice = np.where(np.isfinite(values + criteria), criteria, -np.inf).argmax(axis=1)
        value = np.take_along_axis(values, choice[:, None], axis=1)
        return np.asarray(value - draws.estimate[choice][:, None])

    gains = Draws(
        np.zeros(1),
        gain(draws.joint, by.joint),
        tuple(gain(*pair) for pair in zip(draws.alone, by.alone, strict=True)),
        draws.degrees.min(axis=1, keepdims=True),
    )
    added = float(np.nanmean(gains.joint))
    half = float(_multiples(gains, together=False)[0] * np.nanstd(gains.joint))
    estimate = float(draws.estimate[best])
    chosen = np.where(np.isfinite(by.joint), by.joint, -np.inf).argmax(axis=1) == best
    return Best(
        int(known[best]),
        estimate,
        estimate - added,
        min(estimate - added - half, estimate),
        max(estimate - added + half, estimate),
        float(chosen.mean()),
    )


def _known(draws: Draws) -> NDArray[np.bool_]:
    return np.isfinite(draws.estimate) & np.isfinite(draws.joint).any(axis=0)


def _ends(draws: Draws, *, together: bool, positive: bool) -> tuple[Floats, Floats]:
    low, high = np.full((2, len(draws.estimate)), np.nan)
    known = np.flatnonzero(_known(draws))
    if not len(known):
        return low, high
    draws = draws.take(known)
    logarithmic = np.zeros(len(known), dtype=bool)
    if positive:
        every = np.vstack([draws.estimate, draws.joint, *draws.alone])
        logarithmic = np.logical_not((every <= 0).any(axis=0))
        draws = combined(_where_logarithm(logarithmic), draws)
    half = _multiples(draws, together=together) * np.sqrt(_mean_squares(draws.joint, draws))
    ends = np.array([draws.estimate - half, draws.estimate + half])
    with np.errstate(over="ignore"):
        ends = np.where(logarithmic, np.exp(ends), ends)
    low[known], high[known] = np.maximum(ends, 0) if positive else ends
    return low, high


def _where_logarithm(chosen: NDArray[np.bool_]) -> Callable[[Floats], Floats]:
    return lambda value: np.asarray(np.where(chosen, np.log(value), value))


def _mean_squares(part: Floats, draws: Draws) -> Floats:
    with np.errstate(invalid="ignore"):
        squares = (part - draws.estimate) ** 2
    found = np.isfinite(squares)
    total = np.where(found, squares, 0).sum(axis=0)
    return np.asarray(total / np.maximum(found.sum(axis=0), 1))


def _multiples(draws: Draws, *, together: bool) -> Floats:
    """By how many standard errors an interval extends, float64 [columns]."""
    if not together and len(draws.estimate) > 1:
        # One by one: what else is in a table makes no difference to an interval by itself.
        each = (
            _multiples(draws.take([column]), together=True) for column in range(len(draws.estimate))
        )
        return np.concatenate(list(each))
    generator = np.random.default_rng(_SEED)
    of_all = _mean_squares(draws.joint, draws)
    columns = np.flatnonzero(of_all > 0)
    multiples = np.zeros(len(of_all))
    if not len(columns):
        return multiples
    draws, of_all = draws.take(columns), of_all[columns]
    # One factor's own draws are all there is where one alone is drawn.
    parts = draws.alone or (draws.joint,)
    squares = [
        np.where(degrees > 0, _mean_squares(part, draws), 0)
        for part, degrees in zip(parts, draws.degrees[: len(parts)], strict=True)
    ]
    if len(draws.degrees) > len(parts):
        squares.append(np.maximum(of_all - np.sum(squares, axis=0), 0))
    whole = np.sum(squares, axis=0)
    variance = np.zeros((_SIMULATIONS, len(columns)))
    spread = np.zeros(len(columns))
    for number, (square, degrees) in enumerate(zip(squares, draws.degrees, strict=True)):
        field = None
        if number < len(parts) and degrees.max() <= _MANY_DEGREES:
            field = _field(parts[number], draws, float(degrees.max()))
        variance += square / whole * _variances(field, degrees, generator)
        spread += (square / whole) ** 2 / np.maximum(degrees, 1)
    numerator = _normal(_field(draws.joint, draws, 1 / spread.mean()), generator)
    ratio = np.abs(numerator) / np.sqrt(variance)
    multiples[columns] = np.quantile(ratio.max(axis=1) if together else ratio, CONFIDENCE, axis=0)
    return multiples


def _field(part: Floats, draws: Draws, degrees: float) -> Floats:
    """A root of the correlations between the columns of some draws, float64 [rank, columns].

    Few levels make columns look more alike than they are, and the largest of many smaller: three
    tasks leave two dimensions. The squared correlations are too large by about (1 - r²)² / degrees,
    and all correlations are shrunk by the share that this is of them (J. Schäfer and K. Strimmer,
    "A shrinkage approach to large-scale covariance matrix estimation", 2005).
    """
    away = part - draws.estimate
    root: Floats = np.linalg.qr(np.where(np.isfinite(away), away, 0)).R
    length = np.sqrt((root**2).sum(axis=0))
    root = root / np.where(length > 0, length, 1)
    squared = (root.T @ root) ** 2
    np.fill_diagonal(squared, 0)
    excess = ((1 - squared) ** 2).sum() - len(squared)  # without the diagonal's
    shrunk = min(1.0, excess / max(degrees, 1.0) / max(squared.sum(), 1e-9))
    return np.vstack([math.sqrt(1 - shrunk) * root, math.sqrt(shrunk) * np.eye(len(squared))])


def _normal(field: Floats, generator: np.random.Generator) -> Floats:
    return np.asarray(generator.standard_normal((_SIMULATIONS, len(field))) @ field)


def _variances(field: Floats | None, degrees: Counts, generator: np.random.Generator) -> Floats:
    """Estimates of a variance of 1 with so many degrees of freedom, [simulations, columns]."""
    if field is None:
        free = np.maximum(degrees, 1)
        return np.asarray(generator.chisquare(free, size=(_SIMULATIONS, len(degrees))) / free)
    found = np.zeros((_SIMULATIONS, len(degrees)))
    for number in range(int(degrees.max())):
        found += np.where(number < degrees, _normal(field, generator) ** 2, 0)
    return found / np.maximum(degrees, 1)
