"""The residuals of a capture, chunk by chunk: joined when asked for, written without being joined.

A capture of many cells is larger than memory; its chunks may be maps of files on disk.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


class Residuals(Mapping[str, Tensor]):
    """Tensors by name, their first axis the cells, float32 [cells, positions, layers, d_model].

    Args:
        chunks: for each chunk, its cells and the tensors of them.

    The cells are in ascending order, whatever the order of the chunks.
    """

    def __init__(self, chunks: Sequence[tuple[Sequence[int], Mapping[str, Tensor]]]) -> None:
        self._chunks = [tensors for _, tensors in chunks]
        places = [
            (cell, chunk, row)
            for chunk, (cells, _) in enumerate(chunks)
            for row, cell in enumerate(cells)
        ]
        self._places = [(chunk, row) for _, chunk, row in sorted(places)]

    def __getitem__(self, name: str) -> Tensor:
        """All cells of one tensor, as a new tensor."""
        return torch.stack([self._chunks[chunk][name][row] for chunk, row in self._places])

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunks[0])

    def __len__(self) -> int:
        return len(self._chunks[0])

    def of(self, name: str, cell: int) -> Tensor:
        """One cell of one tensor, [positions, layers, d_model]; `cell` counts those of `chunks`."""
        chunk, row = self._places[cell]
        return self._chunks[chunk][name][row]

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write a safetensors file, a cell at a time.

        The package's own writer wants all tensors in memory, and orders the metadata by chance.

        Args:
            path: of the file.
            metadata: what else it says.
        """
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name in self:
            shape = [len(self._places), *self.of(name, 0).shape]
            begin, end = end, end + 4 * torch.Size(shape).numel()
            header[f"h_{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format has the data aligned
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in self:
                for cell in range(len(self._places)):
                    file.write(self.of(name, cell).contiguous().numpy().astype("<f4").tobytes())
