"""Run directories: where they may go, and that they are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from persona_nnsight import PersonaError, read_table
from persona_nnsight.storage.run_directory import check_free, default_directory


def test_default_directories_count_up(tmp_path: Path) -> None:
    first = default_directory("inject-tiny-short", tmp_path)
    assert first.name == "inject-tiny-short-1"
    first.mkdir()
    (tmp_path / "inject-tiny-short-3").mkdir()
    assert default_directory("inject-tiny-short", tmp_path).name == "inject-tiny-short-2"


def test_new_and_empty_directories_are_free(tmp_path: Path) -> None:
    check_free(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    assert not (tmp_path / "a").exists()


def test_what_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name, says in (
        ("file", "is a file"),
        ("run", "already holds a run"),
        ("full", "is not empty"),
        ("dangling", "is a file"),
        ("file/below", "Cannot create"),
    ):
        with pytest.raises(PersonaError, match=says):
            check_free(tmp_path / name)


def test_tables_come_back_with_their_types(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "persona": ["NA", "007"],
            "task": ["null", "x,y"],
            "layers": ["14", "2"],
            "kl": [0.1234567890123, float("nan")],
            "n_tokens": [10, 0],
        }
    )
    table.to_csv(tmp_path / "kl.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "kl.csv"), table)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PersonaError, match="no directory that you may write to"):
        check_free(tmp_path / "locked" / "run")
