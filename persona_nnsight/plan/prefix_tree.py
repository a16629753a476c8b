"""The openings of prompts as a tree of token segments, so that what they share is run once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from persona_nnsight.plan.plan import CellPlan, Plan, unique_prompts

#: A shared segment has to save so many tokens: it costs a forward with few rows, which reads all
#: weights for little work.
_LEAST_SAVED = 32
#: Tokens of padding in a batch: as many as another forward costs, which reads all weights again.
_MOST_PADDING = 64
#: In a probing tree, tokens of a short step, and of an opening that is cut in two at all.
_SHORT_STEP, _LEAST_CUT = 3, 6


@dataclass(frozen=True)
class Segment:
    """Tokens that follow those of `parent`, a segment's number, or begin a prompt (None).

    Attributes:
        parent: what stands before.
        ids: token ids, at least one.
        depth: how many segments stand before.
    """

    parent: int | None
    ids: tuple[int, ...]
    depth: int


@dataclass(frozen=True)
class PrefixTree:
    """The openings of some prompts: all their tokens but the plan's tail.

    Attributes:
        prompts: indices into `Plan.prompts`.
        segments: the tree, each segment after its parent.
        last: for each of `prompts`, the segment that its opening ends with.
        batches: numbers of the segments that run together, in an order in which they can run.
    """

    prompts: tuple[int, ...]
    segments: tuple[Segment, ...]
    last: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that are run, padding left out."""
        return sum(len(segment.ids) for segment in self.segments)


def prefix_tree(
    plan: Plan, cells: Iterable[CellPlan], *, window: int, most_tokens: int
) -> PrefixTree:
    """Lay out the openings of the prompts of `cells`.

    Args:
        plan, cells: the plan, and cells of it.
        window: of the model's shortest sliding attention window. A layer that lets go of tokens
            cannot be brought together with others, so then nothing is shared, in one batch.
        most_tokens: in a batch, padding included.
    """
    prompts = tuple(unique_prompts(plan, cells))
    openings = _openings(plan, prompts)
    if _slides(plan, openings, window):
        return _apart(prompts, openings)
    segments, last = lay_out(openings)
    return PrefixTree(prompts, tuple(segments), tuple(last), _batches(segments, most_tokens))


def probing_tree(plan: Plan, prompts: Sequence[int], *, window: int) -> PrefixTree:
    """Lay out the openings of some prompts in two steps, with padding before and between them.

    That is all that `prefix_tree` may do, whether it would with these prompts or not.
    """
    openings = _openings(plan, prompts)
    if _slides(plan, openings, window) or min(map(len, openings)) < _LEAST_CUT:
        return _apart(prompts, openings)
    # Short steps beside long ones: much padding before the first step of one and the second of the
    # other, and lengths on both sides of any at which a model changes its mind.
    cuts = [
        len(own) - _SHORT_STEP if number % 2 else _SHORT_STEP for number, own in enumerate(openings)
    ]
    pairs = list(zip(openings, cuts, strict=True))
    count = len(openings)
    segments = [Segment(None, opening[:cut], 0) for opening, cut in pairs]
    segments += [Segment(number, opening[cut:], 1) for number, (opening, cut) in enumerate(pairs)]
    first, second = tuple(range(count)), tuple(range(count, 2 * count))
    return PrefixTree(tuple(prompts), tuple(segments), second, (first, second))


def _openings(plan: Plan, prompts: Sequence[int]) -> list[tuple[int, ...]]:
    return [plan.prompts[index].ids[: -plan.tail] for index in prompts]


def _slides(plan: Plan, openings: Sequence[tuple[int, ...]], window: int) -> bool:
    """Whether a row of the plan may get as long as a sliding window."""
    longest = max(map(len, openings)) + plan.tail + max(plan.reference_tokens, plan.longest_text)
    return longest >= window


def _apart(prompts: Sequence[int], openings: Sequence[tuple[int, ...]]) -> PrefixTree:
    """Every opening by itself, all in one batch."""
    every = tuple(range(len(openings)))
    segments = tuple(Segment(None, opening, 0) for opening in openings)
    return PrefixTree(tuple(prompts), segments, every, (every,))


def lay_out(openings: Sequence[tuple[int, ...]]) -> tuple[list[Segment], list[int]]:
    """Lay out token sequences, none empty, so that what many begin with is there once.

    Returns:
        Segments, each after its parent, and for every opening the number of its last segment.
    """
    segments: list[Segment] = []
    last = [0] * len(openings)
    waiting: list[tuple[_Branch, int | None]] = [
        (branch, None) for branch in _grow(openings, list(range(len(openings))), 0)
    ]
    while waiting:
        branch, parent = waiting.pop()
        depth = 0 if parent is None else segments[parent].depth + 1
        for opening in branch.ends:
            last[opening] = len(segments)
        waiting += [(child, len(segments)) for child in branch.children]
        segments.append(Segment(parent, branch.ids, depth))
    return segments, last


@dataclass(frozen=True)
class _Branch:
    """Tokens, what follows them, and the openings that end with them."""

    ids: tuple[int, ...]
    children: tuple[_Branch, ...]
    ends: tuple[int, ...]


def _grow(openings: Sequence[tuple[int, ...]], group: list[int], start: int) -> list[_Branch]:
    """The openings of `group`, which share the token `start` and all before it, from there on."""
    # What the first and the last in order have in common, all between them have.
    first, final = (pick(openings[index] for index in group) for pick in (min, max))
    end = start
    while end < len(first) and first[end] == final[end]:
        end += 1
    ids = first[start:end]
    by_next: dict[int, list[int]] = {}
    ends = tuple(index for index in group if len(openings[index]) == end)
    for index in group:
        if len(openings[index]) > end:
            by_next.setdefault(openings[index][end], []).append(index)
    children = [branch for own in by_next.values() for branch in _grow(openings, own, end)]
    copies = len(children) + bool(ends)
    if not children or len(ids) * (copies - 1) >= _LEAST_SAVED:
        return [_Branch(ids, tuple(children), ends)] if ids else children
    apart = [_Branch(ids + child.ids, child.children, child.ends) for child in children]
    return [*apart, _Branch(ids, (), ends)] if ends else apart


def _batches(segments: Sequence[Segment], most_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Segments of one depth and about one length each."""

    def shape(number: int) -> tuple[int, int]:
        return segments[number].depth, len(segments[number].ids)

    batches: list[list[int]] = []
    for _, level in groupby(sorted(range(len(segments)), key=shape), key=lambda n: shape(n)[0]):
        batches.append([])
        padding = 0
        for number in level:
            length, batch = len(segments[number].ids), batches[-1]
            more = len(batch) * (length - len(segments[batch[-1]].ids)) if batch else 0
            too_many = (len(batch) + 1) * length > most_tokens
            if batch and (too_many or padding + more > _MOST_PADDING):
                batches.append([])
                padding, more = 0, 0
            batches[-1].append(number)
            padding += more
    return tuple(map(tuple, batches))
