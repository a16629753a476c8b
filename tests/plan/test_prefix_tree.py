"""The tree of prompts' openings: what it spells, what it shares, and how it is cut into batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from trees import plan_of

from persona_nnsight.plan.interventions import Write
from persona_nnsight.plan.plan import CellPlan, Edit
from persona_nnsight.plan.prefix_tree import PrefixTree, Segment, lay_out, prefix_tree

Tokens = tuple[int, ...]

#: Tokens that a shared segment has to save, and the most padding of a batch.
LEAST_SAVED, MOST_PADDING = 32, 64
#: Beyond any text here.
WIDE = 10**6


def path(segments: Sequence[Segment], number: int) -> list[int]:
    """The segments from the root to this one."""
    found = [number]
    while (parent := segments[found[0]].parent) is not None:
        found.insert(0, parent)
    return found


def spelled(segments: Sequence[Segment], number: int) -> Tokens:
    return tuple(token for step in path(segments, number) for token in segments[step].ids)


def places(segments: Sequence[Segment], number: int) -> list[tuple[int, int]]:
    """For each token up to the end of a segment, the segment and the index in it."""
    return [(step, i) for step in path(segments, number) for i in range(len(segments[step].ids))]


def draw_openings(seed: int) -> list[Tokens]:
    """Random sequences: many begin like others, some are openings of others, some are there twice.

    Few different tokens, so that some agree by chance as well.
    """
    draw = random.Random(seed)

    def tokens(most: int) -> Tokens:
        return tuple(draw.randrange(4) for _ in range(draw.randint(1, most)))

    found = [tokens(50)]
    for _ in range(draw.randint(1, 40)):
        old = draw.choice(found)
        start = old[: draw.randint(0, len(old))]
        found.append(draw.choice([old, start or old, start + tokens(40), old + tokens(10)]))
    draw.shuffle(found)
    return found


SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_opening_is_spelled_once(seed: int) -> None:
    openings = draw_openings(seed)
    segments, last = lay_out(openings)
    assert [spelled(segments, number) for number in last] == openings
    for number, segment in enumerate(segments):
        assert segment.ids
        assert segment.depth == len(path(segments, number)) - 1
        assert segment.parent is None or segment.parent < number
    # No segment that nothing needs, and never more than each different opening by itself.
    assert {step for number in last for step in path(segments, number)} == set(range(len(segments)))
    assert sum(len(segment.ids) for segment in segments) <= sum(map(len, set(openings)))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shared_segment_saves_enough(seed: int) -> None:
    segments, last = lay_out(draw_openings(seed))
    for number, segment in enumerate(segments):
        after = sum(other.parent == number for other in segments) + (number in last)
        if after > (number in last):
            assert len(segment.ids) * (after - 1) >= LEAST_SAVED


@pytest.mark.parametrize("seed", SEEDS)
def test_what_saves_enough_is_there_once(seed: int) -> None:
    openings = draw_openings(seed)
    segments, last = lay_out(openings)
    own = [places(segments, number) for number in last]
    starts = {opening[:end] for opening in openings for end in range(1, len(opening) + 1)}
    # Where openings part: by how many ways they go on, their end among these.
    ways = {
        start: len(
            {opening[len(start) :][:1] for opening in openings if opening[: len(start)] == start}
        )
        for start in starts
    }
    for start in starts:
        before = next((n for n in range(len(start) - 1, 0, -1) if ways[start[:n]] > 1), 0)
        if (len(start) - before) * (ways[start] - 1) >= LEAST_SAVED:
            through = [
                where[before : len(start)]
                for where, opening in zip(own, openings, strict=True)
                if opening[: len(start)] == start
            ]
            assert all(where == through[0] for where in through)


def test_the_random_openings_are_what_they_should_be() -> None:
    """Otherwise the tests above test little."""
    shared = copies = within = deep = 0
    for seed in SEEDS:
        openings = draw_openings(seed)
        segments, last = lay_out(openings)
        parents = {segment.parent for segment in segments} - {None}
        shared += len(parents)
        copies += len(openings) - len(set(openings))
        within += len(set(last) & parents)
        deep += max(segment.depth for segment in segments) >= 2
    assert min(shared, copies, within, deep) >= 10


@pytest.mark.parametrize(
    ("length", "count", "is_shared"),
    [
        (32, 2, True),
        (31, 2, False),
        (16, 3, True),
        (15, 3, False),
        (8, 5, True),
        (10, 4, False),
        (1, 33, True),
        (1, 32, False),
    ],
)
@pytest.mark.parametrize("one_ends", [False, True])
def test_sharing_begins_at_32_saved_tokens(
    length: int, count: int, is_shared: bool, one_ends: bool
) -> None:
    stem = (1,) * length
    openings = [(*stem, 10 + number, 2) for number in range(count)]
    if one_ends:
        openings[-1] = stem
    segments, last = lay_out(openings)
    assert [spelled(segments, number) for number in last] == openings
    total = sum(map(len, openings))
    assert sum(len(segment.ids) for segment in segments) == (
        total - length * (count - 1) if is_shared else total
    )
    assert [segment.ids for segment in segments].count(stem) == (is_shared or one_ends)


def test_a_tree_by_hand() -> None:
    a, b, c = tuple(range(100, 140)), tuple(range(200, 210)), tuple(range(300, 310))
    openings: list[Tokens] = [
        *((*a, *b, n) for n in range(5)),  # 10 tokens save 40: shared below a
        *((*a, *c, n) for n in range(4)),  # 10 tokens save 30: apart below a
        a,  # what others begin with
        (*a, *b, 3),  # a copy
        (7, 8),
    ]
    segments, last = lay_out(openings)
    expected = {
        (a,),
        (a, b),
        *((a, b, (n,)) for n in range(5)),
        *((a, (*c, n)) for n in range(4)),
        ((7, 8),),
    }
    found = [
        tuple(segments[step].ids for step in path(segments, number))
        for number in range(len(segments))
    ]
    assert len(found) == len(expected)
    assert set(found) == expected
    assert [found[number] for number in last] == [
        *((a, b, (n,)) for n in range(5)),
        *((a, (*c, n)) for n in range(4)),
        (a,),
        (a, b, (3,)),
        ((7, 8),),
    ]


def test_one_opening_is_one_segment() -> None:
    assert lay_out([(5, 6)]) == ([Segment(None, (5, 6), 0)], [0])
    assert lay_out([(5, 6)] * 3) == ([Segment(None, (5, 6), 0)], [0, 0, 0])


# ------------------------------------------------------------------------------------ of a plan


def tree_of(openings: Sequence[Tokens], most_tokens: int = WIDE) -> PrefixTree:
    plan = plan_of(openings)
    return prefix_tree(plan, plan.cells, window=WIDE, most_tokens=most_tokens)


@pytest.mark.parametrize("tail", [1, 4])
def test_a_tree_holds_the_prompts_of_its_cells_without_their_tail(tail: int) -> None:
    openings = [(1,) * 40 + (number,) * (1 + number) for number in range(2, 8)]
    plan = plan_of(openings, positions=("p_user_last", "p_last"), tail=tail)
    assert plan.tail == tail
    cells = [
        CellPlan("x", "y", {"BB": 4, "XY": 1}, 0),
        CellPlan("x", "z", {"BB": 4, "XY": 3}, 0),
    ]
    tree = prefix_tree(plan, cells, window=WIDE, most_tokens=WIDE)
    assert tree.prompts == (4, 1, 3)
    assert [spelled(tree.segments, number) for number in tree.last] == [
        openings[number] for number in (4, 1, 3)
    ]
    assert tree.n_tokens == 40 + 7 + 4 + 6


@pytest.mark.parametrize(
    ("positions", "edits", "following"),
    [
        (("p_last",), (), 3),
        (("p_last", "g4"), (), 7),
        (("p_last", "g4"), (Edit(Write("clean", ("p_last",), (0,)), generate=20),), 20),
    ],
)
def test_nothing_is_shared_where_a_window_may_slide(
    positions: tuple[str, ...], edits: tuple[Edit, ...], following: int
) -> None:
    openings = [(1,) * 40 + (number,) for number in range(5)]
    plan = plan_of(openings, positions=positions, edits=edits)
    longest = 41 + 1 + following
    shared = prefix_tree(plan, plan.cells, window=longest + 1, most_tokens=50)
    assert shared.n_tokens == 45
    assert len(shared.batches) > 1
    apart = prefix_tree(plan, plan.cells, window=longest, most_tokens=50)
    assert apart.segments == tuple(Segment(None, opening, 0) for opening in openings)
    assert apart.last == (0, 1, 2, 3, 4)
    assert apart.batches == ((0, 1, 2, 3, 4),)


# -------------------------------------------------------------------------------------- batches


def lengths(tree: PrefixTree) -> list[list[int]]:
    return [[len(tree.segments[number].ids) for number in batch] for batch in tree.batches]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("most_tokens", [1, 45, 150, WIDE])
def test_batches(seed: int, most_tokens: int) -> None:
    tree = tree_of(draw_openings(seed), most_tokens)
    segments = tree.segments
    order = [number for batch in tree.batches for number in batch]
    assert sorted(order) == list(range(len(segments)))
    batch_of = {number: at for at, batch in enumerate(tree.batches) for number in batch}
    for number, segment in enumerate(segments):
        if segment.parent is not None:
            assert batch_of[segment.parent] < batch_of[number]

    def fits(batch: Sequence[int]) -> bool:
        own = [len(segments[number].ids) for number in batch]
        area = len(own) * max(own)
        return area <= most_tokens and area - sum(own) <= MOST_PADDING

    for batch in tree.batches:
        assert len({segments[number].depth for number in batch}) == 1
        assert len(batch) == 1 or fits(batch)
    # A batch ends only where the next segment has no place in it.
    for batch, following in pairwise(tree.batches):
        if segments[batch[0]].depth == segments[following[0]].depth:
            assert not fits([*batch, following[0]])


def test_a_batch_holds_so_many_tokens() -> None:
    openings = [(number,) * 5 for number in range(10)]
    assert lengths(tree_of(openings, 20)) == [[5] * 4, [5] * 4, [5] * 2]
    assert lengths(tree_of(openings, 24)) == [[5] * 4, [5] * 4, [5] * 2]
    assert lengths(tree_of(openings, 25)) == [[5] * 5, [5] * 5]
    assert lengths(tree_of(openings, 4)) == [[5]] * 10
    # Padding counts.
    assert lengths(tree_of([(1,) * 10, (2,) * 10, (3,) * 14], 34)) == [[10, 10], [14]]


def test_a_batch_holds_so_much_padding() -> None:
    def of_lengths(*counts: int) -> list[list[int]]:
        return lengths(tree_of([(number,) * count for number, count in enumerate(counts)]))

    assert of_lengths(42, 10, 10) == [[10, 10, 42]]
    assert of_lengths(43, 10, 10) == [[10, 10], [43]]
    # What earlier segments added to the padding still counts, and a new batch begins without.
    assert of_lengths(10, 42, 58) == [[10, 42, 58]]
    assert of_lengths(10, 42, 59) == [[10, 42], [59]]
    assert of_lengths(10, 80, 144, 145) == [[10], [80, 144], [145]]


def test_a_level_runs_after_the_one_that_it_follows() -> None:
    openings = [(1,) * 40 + (number,) * (2 + number) for number in range(2, 6)] + [(9,) * 3]
    assert lengths(tree_of(openings)) == [[3, 40], [4, 5, 6, 7]]
