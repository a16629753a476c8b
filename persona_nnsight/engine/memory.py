"""Batches, and what to do when memory runs out: halve the batch and go on."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from persona_nnsight.errors import OutOfMemoryError
from persona_nnsight.plan.costs import spans

T = TypeVar("T")
R = TypeVar("R")

_log = logging.getLogger(__name__)


def in_batches(
    items: Sequence[T],
    size: int,
    work: Callable[[Sequence[T]], R],
    is_done: Callable[[Sequence[T]], bool] = lambda _: False,
) -> Iterator[tuple[Sequence[T], R]]:
    """Work on `items` in batches of at most `size`, as they are asked for.

    Args:
        items: what is to be done.
        size: of a batch, at most.
        work: does a batch.
        is_done: whether a batch can be passed over. A batch of which a part is done is worked on
            whole: its numbers would be rounded otherwise with fewer rows.

    Returns:
        Each batch and its result. After memory ran out, batches are half as large.

    Raises:
        OutOfMemoryError: memory does not suffice for a single item.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + len(next(spans(len(items) - start, size)))]
        if is_done(batch):
            start += len(batch)
            continue
        try:
            result = work(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = (str(error).strip().splitlines() or ["no more was said"])[-1]
        else:
            start += len(batch)
            yield batch, result
            continue
        # Beyond the handler, where the error no longer holds on to the tensors of its frames.
        if len(batch) == 1:
            raise OutOfMemoryError(
                f"Memory ran out with a single row ({said}); free some of it, or use a shorter "
                "--window, another --dtype or another --device."
            )
        size = (len(batch) + 1) // 2
        _log.warning("Memory ran out with %d rows; going on with %d at a time.", len(batch), size)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def alike(items: Iterable[T], shape: Callable[[T], Hashable]) -> Iterable[list[T]]:
    """Items that can share a batch because their `shape` is the same."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(shape(item), []).append(item)
    return groups.values()


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is torch's error of a GPU, or what its allocator says on a CPU and on Apple's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in said or "can't allocate memory" in said or "not enough memory" in said
    )


#: Share of the free memory that a run may fill besides the weights, where nothing else is asked.
_BUDGET_SHARE = 0.5


def default_budget(device: str) -> int:
    """Bytes that a run on `device` may take where no budget is given: a share of what is free."""
    return int(_BUDGET_SHARE * _free_memory(device))


def _free_memory(device: str) -> int:
    """Bytes that are free now where a model on `device` works."""
    if device == "balanced":
        return min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
