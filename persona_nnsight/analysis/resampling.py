"""Draws of the personas and tasks of a grid, and what a statistic is in each.

The cells of a grid share personas and tasks. Drawing cells takes them for independent and makes
intervals too narrow, so the levels of both factors are drawn, and a cell counts as often as its
persona was drawn times its task: the pigeonhole bootstrap (A. B. Owen, "The pigeonhole bootstrap",
Annals of Applied Statistics 1, 2007). Of a factor with n levels n - 1 are drawn: drawing n would
make the variance between few levels too small, by a third where there are three (J. N. K. Rao and
C. F. J. Wu, "Resampling inference with complex survey data", JASA 83, 1988).

Each factor is also drawn alone, with the other as it is. These draws say how much of the variance
belongs to which factor, and so from how few levels it is known: `verdicts` makes intervals of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int32]

#: Fewer values than this span no interval worth the name.
MIN_CELLS = 5
#: A factor with fewer levels than this is no sample of others: sentences speak of these alone.
FEW_LEVELS = 5

FACTORS = ("persona", "task")

_DRAWS = 2000
#: Of each factor alone: they only weigh the factors against each other.
_DRAWS_ALONE = 500
_SEED = 0
#: Counts that are in memory at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Resampling:
    """Which factors of a grid are drawn.

    Attributes:
        levels: how many personas and how many tasks the cells have.
        drawn: the factors whose levels are drawn. A factor is not drawn where it has one level,
            where its levels are held, and where each of its levels belongs to one level of the
            other factor, with which it is drawn.
    """

    levels: tuple[int, int]
    drawn: tuple[str, ...]

    @property
    def few(self) -> tuple[str, ...]:
        """The factors with so few levels that a sentence speaks of these alone, drawn or not."""
        return tuple(name for name, n in zip(FACTORS, self.levels, strict=True) if n < FEW_LEVELS)

    @property
    def method(self) -> str:
        """What was drawn, for a caption: ``4 personas and 3 tasks, both drawn``."""
        personas, tasks = (_number(n, name) for name, n in zip(FACTORS, self.levels, strict=True))
        how = {2: "both drawn", 0: "none drawn"}.get(
            len(self.drawn), f"{self.drawn[0]}s drawn" if self.drawn else ""
        )
        return f"{personas} and {tasks}, {how}"

    @property
    def scope(self) -> str:
        """Of what the numbers speak: ``these 3 tasks``; empty where no factor has few levels."""
        return " and ".join(
            f"{'this' if n == 1 else 'these'} {_number(n, name)}"
            for name, n in zip(FACTORS, self.levels, strict=True)
            if name in self.few
        )


def _number(n: int, name: str) -> str:
    return f"{n} {name}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class Draws:
    """A statistic of some columns: on all cells, and in every draw.

    Attributes:
        estimate: on all cells, float64 [columns].
        joint: in the draws of all factors together, float64 [draws, columns]; NaN where a draw has
            no cell with a value, and throughout where fewer than five cells have one.
        alone: in the draws of one factor, each float64 [draws, columns].
        degrees: of freedom, [parts, columns]: of the factors in `alone`, then of what the cells
            have beyond them. 0 where a column has one level of a factor.
    """

    estimate: Floats
    joint: Floats
    alone: tuple[Floats, ...]
    degrees: Counts

    def take(self, columns: Sequence[int] | NDArray[np.integer]) -> Draws:
        """Some of the columns, in this order and as often as asked for."""
        return Draws(
            self.estimate[columns],
            self.joint[:, columns],
            tuple(part[:, columns] for part in self.alone),
            self.degrees[:, columns],
        )


def combined(function: Callable[..., Floats], *draws: Draws) -> Draws:
    """A function of several statistics of the same cells, such as a ratio, draw by draw.

    Args:
        function: of as many arrays as there are `draws`, elementwise, [..., columns].
        draws: of one `Crossed`, with equally many columns.
    """
    with np.errstate(all="ignore"):
        return Draws(
            function(*(each.estimate for each in draws)),
            function(*(each.joint for each in draws)),
            tuple(function(*parts) for parts in zip(*(each.alone for each in draws), strict=True)),
            np.min([each.degrees for each in draws], axis=0),
        )


class Crossed:
    """The draws of a grid's cells; the same for every table with the same cells.

    Args:
        cells: persona and task of every row, no pair twice.
        held: factors that are not drawn: the numbers are then about these levels alone.
        draws: how many, of all factors together; a quarter of them of each alone.
    """

    def __init__(
        self,
        cells: Iterable[tuple[Hashable, Hashable]],
        held: Sequence[str] = (),
        draws: int = _DRAWS,
    ) -> None:
        pairs = list(cells)
        # Sorted, so that the order of the rows makes no difference.
        self._levels = [
            _codes([str(pair[factor]) for pair in pairs]) for factor in range(len(FACTORS))
        ]
        counts = [int(codes.max(initial=-1)) + 1 for codes in self._levels]
        self._drawn = [
            factor for factor, name in enumerate(FACTORS) if counts[factor] > 1 and name not in held
        ]
        if len(self._drawn) == len(FACTORS):
            self._drawn = self._without_nested(self._drawn)
        self._counts = counts
        self._size = draws
        self.resampling = Resampling(
            (counts[0], counts[1]), tuple(FACTORS[factor] for factor in self._drawn)
        )

    def medians(self, values: Floats) -> Draws:
        """The median of every column of float64 [cells, columns]; NaN where no value is."""
        return self._of(values, _medians)

    def means(self, values: Floats) -> Draws:
        """The mean of every column; see `medians`."""
        return self._of(values, _means)

    def _of(self, values: Floats, statistic: Callable[[Floats, Counts], Floats]) -> Draws:
        values = np.asarray(values, dtype=float)
        present = np.isfinite(values)
        known = (present.sum(axis=0) >= MIN_CELLS) & bool(self._drawn)
        estimate = statistic(values, np.ones((len(values), 1), dtype=np.int32))[0]
        joint, *alone = (
            self._statistic_of(values, statistic, known, factors)
            for factors in (self._drawn, *self._drawn_alone)
        )
        return Draws(estimate, joint, tuple(alone), self._degrees(present))

    def _statistic_of(
        self,
        values: Floats,
        statistic: Callable[[Floats, Counts], Floats],
        known: NDArray[np.bool_],
        factors: Sequence[int],
    ) -> Floats:
        size = self._size if len(factors) == len(self._drawn) else self._size_alone
        found = np.full((size, values.shape[1]), np.nan)
        for block, counts in self._blocks(factors, size):
            found[block, known] = statistic(values[:, known], counts)
        return found

    @property
    def _size_alone(self) -> int:
        return max(1, self._size * _DRAWS_ALONE // _DRAWS)

    @property
    def _drawn_alone(self) -> list[list[int]]:
        return [[factor] for factor in self._drawn] if len(self._drawn) > 1 else []

    @cached_property
    def _level_counts(self) -> list[Counts]:
        """How often each level of a factor is drawn, [levels, draws]; once where none is drawn."""
        found = []
        for factor, n in enumerate(self._counts):
            generator = np.random.default_rng([_SEED, factor])
            odds = np.full(n, 1 / max(n, 1))
            counts = generator.multinomial(n - 1, odds, size=self._size).T
            if factor not in self._drawn:
                counts = np.ones_like(counts)
            found.append(np.ascontiguousarray(counts, dtype=np.int32))
        return found

    def _blocks(self, factors: Sequence[int], size: int) -> Iterator[tuple[slice, Counts]]:
        """How often every cell is drawn, [cells, draws], in blocks."""
        cells = len(self._levels[0])
        step = max(1, _BLOCK // max(cells, 1))
        for start in range(0, size, step):
            block = slice(start, min(start + step, size))
            counts = np.ones((cells, block.stop - start), dtype=np.int32)
            for factor in factors:
                counts *= self._level_counts[factor][:, block][self._levels[factor]]
            yield block, counts

    def _degrees(self, present: NDArray[np.bool_]) -> Counts:
        n = present.sum(axis=0)
        levels = []
        for factor in self._drawn:
            seen = np.zeros((self._counts[factor], present.shape[1]), dtype=bool)
            np.logical_or.at(seen, self._levels[factor], present)
            levels.append(np.maximum(seen.sum(axis=0) - 1, 0))
        if len(levels) < 2:
            return np.array(levels, dtype=np.int32).reshape(len(levels), present.shape[1])
        return np.array([*levels, np.maximum(n - 1 - sum(levels), 1)], dtype=np.int32)

    def _without_nested(self, factors: list[int]) -> list[int]:
        """The factors but for one whose every level occurs with a single level of the other."""
        pairs = set(zip(*(codes.tolist() for codes in self._levels), strict=True))
        for inner, outer in ((1, 0), (0, 1)):
            if len(pairs) == len({pair[inner] for pair in pairs}):
                return [outer]
        return factors


def _codes(names: Sequence[str]) -> Counts:
    return np.unique(np.array(names, dtype=object), return_inverse=True)[1].astype(np.int32)


def _medians(values: Floats, counts: Counts) -> Floats:
    """The median of every column with cells counted as often as `counts` says, [draws, columns].

    The values are sorted once per column: that is many times faster than drawing them.
    """
    found = np.full((counts.shape[1], values.shape[1]), np.nan)
    for column, value in enumerate(values.T):
        order = np.flatnonzero(np.isfinite(value))
        order = order[np.argsort(value[order], kind="stable")]
        if len(order):
            twice_upto = 2 * np.cumsum(counts[order], axis=0, dtype=counts.dtype)
            number = twice_upto[-1] // 2
            ranked = np.append(value[order], np.nan)  # a draw without a cell has no median
            lower, upper = (
                ranked[np.where(number > 0, below.sum(axis=0), len(order))]
                for below in (twice_upto < number, twice_upto <= number)
            )
            found[:, column] = (lower + upper) / 2
    return found


def _means(values: Floats, counts: Counts) -> Floats:
    """The mean of every column with cells counted as often as `counts` says, [draws, columns]."""
    present = np.isfinite(values)
    drawn = counts.T.astype(float)
    with np.errstate(invalid="ignore"):
        return np.asarray(drawn @ np.where(present, values, 0.0) / (drawn @ present.astype(float)))
