"""A run of every command and the page about it; only to be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import MAKERS

from persona_nnsight.report.write import write_report


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every command."""
    root = tmp_path_factory.mktemp("runs")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="session")
def pages(runs: dict[str, Path]) -> dict[str, str]:
    """The page about each of them, written into its directory."""
    return {name: write_report([run]).read_text("utf-8") for name, run in runs.items()}
