"""What runs leave, for tests that spoil a copy of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cells import TINY_GRID
from tiny import Tiny

from persona_nnsight import capture, substitute


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """A directory with saved vectors and a run to report on; only to be copied."""
    place = tmp_path_factory.mktemp("saved")
    model = tiny("llama")
    captured = capture(model, TINY_GRID, layers="2", positions="p_last")
    captured.vectors().save(place / "vectors.safetensors")
    edited = substitute(model, TINY_GRID, layers="2", positions="p_last", generate=2)
    edited.save(place / "substituted")
    return place
