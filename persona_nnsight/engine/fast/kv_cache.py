"""KV caches of many rows: rows chosen, cut, and brought together.

A forward of transformers' own caches makes longer tensors and leaves those it was given as they
are, so caches can share them. Where rows are copied anyway, they are given room, and what a forward
appends is written into it: at every step of decoding, longer tensors would cost half as much as
the step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the first tokens of some rows.

    Attributes:
        cache: by layer, each [rows, heads, length, head_dim].
        mask: 1 where a column holds a token of the row and 0 at padding, int [rows, length].
    """

    cache: DynamicCache
    mask: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether every layer holds every column: none has a window that slid past the first."""
        length = self.mask.shape[1]
        return all(_tensors(layer)[0].shape[2] == length for layer in self.cache.layers)

    def select(
        self, rows: Sequence[int], *, length: int | None = None, first_layer: int = 0, room: int = 0
    ) -> KVCache:
        """Some rows, in this order.

        Args:
            rows: row numbers.
            length: cut to so many columns, of a cache that `is_whole`; None for all.
            first_layer: layers below it will be skipped, so their rows are not copied.
            room: tokens that will be appended, into tensors of the selection's own.
        """
        span = slice(rows[0], rows[-1] + 1)
        chosen = copy.copy(self.cache)
        consecutive = list(rows) == list(range(span.start, span.stop))
        wanted = torch.tensor(rows)

        def pick(tensor: Tensor) -> Tensor:
            if consecutive:
                return tensor[span]
            return tensor.index_select(0, wanted.to(tensor.device))

        chosen.layers = []
        for number, layer in enumerate(self.cache.layers):
            keys, values = (tensor[:, :, :length] for tensor in _tensors(layer))
            if number < first_layer:
                chosen.layers.append(_with(layer, keys, values, length))
                continue
            keys, values = pick(keys), pick(values)
            if room and not isinstance(layer, DynamicSlidingWindowLayer):
                chosen.layers.append(_GrowingLayer(keys, values, room))
            else:
                chosen.layers.append(_with(layer, keys, values, length))
        return KVCache(chosen, pick(self.mask)[:, :length])


class _GrowingLayer(DynamicLayer):
    """Keys and values with room for more, which `update` writes in place."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._room = [
            tensor.new_empty(*tensor.shape[:2], tensor.shape[2] + room, tensor.shape[3])
            for tensor in (keys, values)
        ]
        self._length = 0
        self.update(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [rows, heads, tokens, head_dim]; returns all there are."""
        start, self._length = self._length, self._length + key_states.shape[2]
        for whole, new in zip(self._room, (key_states, value_states), strict=True):
            whole[:, :, start : self._length] = new
        self.keys, self.values = (whole[:, :, : self._length] for whole in self._room)
        return self.keys, self.values


def gather(rows: Sequence[tuple[KVCache, int]]) -> KVCache:
    """Rows of several caches, each `is_whole`, as one: their tokens moved to the right end.

    Neighbours of one source are copied together.
    """
    runs = [list(run) for _, run in groupby(rows, key=lambda row: id(row[0]))]
    parts = [(run[0][0], [row for _, row in run]) for run in runs]
    masks = [source.mask[chosen] for source, chosen in parts]
    counts = torch.cat([mask.sum(1) for mask in masks])
    length = int(counts.max())
    columns = [_right_end(mask, length) for mask in masks]
    cache = copy.copy(parts[0][0].cache)
    layers = []
    for number, layer in enumerate(cache.layers):
        pairs = [
            [_gathered(tensor, chosen, where) for tensor in _tensors(source.cache.layers[number])]
            for (source, chosen), where in zip(parts, columns, strict=True)
        ]
        keys, values = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        layers.append(_with(layer, keys, values, length))
    cache.layers = layers
    padding = (length - counts)[:, None]
    mask = torch.arange(length, device=counts.device) >= padding
    return KVCache(cache, mask.to(masks[0].dtype))


def _gathered(tensor: Tensor, rows: Sequence[int], columns: Tensor) -> Tensor:
    """Some columns of some rows of [rows, heads, length, head_dim]: [len(rows), heads, n, ...]."""
    _, heads, length, width = tensor.shape
    row = torch.tensor(rows, device=tensor.device)[:, None, None]
    head = torch.arange(heads, device=tensor.device)[:, None]
    # One index per vector, so that whole vectors are copied.
    index = (row * heads + head) * length + columns.to(tensor.device)[:, None]
    found = tensor.reshape(-1, width).index_select(0, index.flatten())
    return found.view(*index.shape, width)


def _right_end(mask: Tensor, length: int) -> Tensor:
    """Columns of each row's tokens, in order and behind any others, int [rows, length]."""
    # Stable: padding comes first, tokens stay in order.
    columns = mask.argsort(dim=1, stable=True)[:, -length:]
    return pad(columns, (length - columns.shape[1], 0))


def _tensors(layer: Any) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, DynamicLayer)  # prefill has refused all others
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def _with(layer: Any, keys: Tensor, values: Tensor, length: int | None) -> Any:
    """A layer like this one with other keys and values, of `length` tokens (None: as many)."""
    if isinstance(layer, _GrowingLayer):  # whose room is its own
        other: Any = DynamicLayer()
        other.lazy_initialization(keys, values)
    else:
        other = copy.copy(layer)
    other.keys, other.values = keys, values
    if length is not None and isinstance(layer, DynamicSlidingWindowLayer):
        other.cumulative_length = length
    return other
