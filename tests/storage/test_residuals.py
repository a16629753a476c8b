"""Residuals in chunks: in the order of the cells, and in a file that the library reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from persona_nnsight.storage.residuals import Residuals


@pytest.fixture
def whole() -> dict[str, torch.Tensor]:
    return {name: torch.randn(5, 2, 3, 4) for name in ("BB", "XB", "BY", "XY")}


def chunked(whole: dict[str, torch.Tensor], *chunks: tuple[int, ...]) -> Residuals:
    return Residuals(
        [(cells, {key: value[list(cells)] for key, value in whole.items()}) for cells in chunks]
    )


@pytest.mark.parametrize(
    "chunks", [((0, 1, 2, 3, 4),), ((0, 1), (2, 3), (4,)), ((3,), (4, 0, 2, 1))]
)
def test_chunks_are_one_tensor(
    whole: dict[str, torch.Tensor], chunks: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    found = chunked(whole, *chunks)
    assert list(found) == list(whole)
    assert len(found) == 4
    for key, value in whole.items():
        assert torch.equal(found[key], value)
        assert torch.equal(found.of(key, 3), value[3])
    path = tmp_path / "residuals.safetensors"
    found.write(path, {"cells": '["ä"]', "layers": "[1]"})
    read = load_file(path)
    assert set(read) == {f"h_{key}" for key in whole}
    assert all(torch.equal(read[f"h_{key}"], value) for key, value in whole.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"cells": '["ä"]', "layers": "[1]"}


def test_cells_that_are_missing_are_left_out(whole: dict[str, torch.Tensor]) -> None:
    """Of an interrupted run."""
    found = chunked(whole, (3,), (1,))
    assert torch.equal(found["XY"], whole["XY"][[1, 3]])
    assert torch.equal(found.of("XY", 1), whole["XY"][3])


def test_the_same_bytes_whatever_the_chunks(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    chunked(whole, (0, 1, 2, 3, 4)).write(paths[0], {"a": "1", "b": "2"})
    chunked(whole, (4, 3), (0, 1, 2)).write(paths[1], {"a": "1", "b": "2"})
    assert paths[0].read_bytes() == paths[1].read_bytes()
