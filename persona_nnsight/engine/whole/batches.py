"""Batches of rows that have one length, so that none is padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from persona_nnsight.engine.memory import alike, in_batches

T = TypeVar("T")
R = TypeVar("R")


def in_even_batches(
    items: Sequence[T],
    shape: Callable[[T], tuple[int, ...]],
    size: Callable[[tuple[int, ...]], int],
    work: Callable[[Sequence[T]], R],
) -> Iterator[tuple[Sequence[T], R]]:
    """Work on `items` in batches of one shape.

    Args:
        items: what is to be done.
        shape: of an item, its lengths.
        size: how many items of a shape make a batch at most.
        work: does a batch.

    Returns:
        Each batch and its result.
    """
    for group in alike(items, shape):
        yield from in_batches(group, size(shape(group[0])), work)
