"""Run directories: where they may go, and that they are there whole or not at all."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from commands import WHERE, Persona
from tiny import TinyDir

from persona_nnsight import PersonaError, read_table
from persona_nnsight.storage.run_directory import (
    check_free,
    default_directory,
    release_unused,
)


def test_default_directories_count_up(tmp_path: Path) -> None:
    first = default_directory("inject-tiny-short", tmp_path)
    assert first.name == "inject-tiny-short-1"
    assert first.is_dir()
    (tmp_path / "inject-tiny-short-3").mkdir()
    assert default_directory("inject-tiny-short", tmp_path).name == "inject-tiny-short-2"


def test_a_number_is_nobody_elses(tmp_path: Path) -> None:
    """Many at once, each with a directory of its own."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: default_directory("run", tmp_path / "a" / "b"), range(40)))
    assert len(set(made)) == 40
    assert {path.name for path in made} == {f"run-{n}" for n in range(1, 41)}


def test_what_is_not_used_is_taken_back(tmp_path: Path) -> None:
    used, unused = (default_directory("run", tmp_path / "outputs") for _ in range(2))
    (used / "run.json").write_text("{}")
    release_unused()
    assert used.is_dir()
    assert not unused.exists()
    (used / "run.json").unlink()
    default_directory("run", tmp_path / "more" / "outputs")
    release_unused()
    assert not (tmp_path / "more").exists()
    assert used.is_dir()  # of another process, as far as this one knows


@pytest.mark.parametrize("there", ["a file", "a link to nowhere"])
def test_no_number_where_nothing_can_be_made(tmp_path: Path, there: str) -> None:
    if there == "a file":
        (tmp_path / "outputs").write_text("x")
    else:
        (tmp_path / "outputs").symlink_to("gone")
    for root in (tmp_path / "outputs", tmp_path / "outputs" / "below"):
        with pytest.raises(PersonaError, match="choose another --out"):
            default_directory("run", root)


def test_a_run_that_comes_to_nothing_leaves_no_number(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused after the number was taken, and stopped before anything was finished."""
    run = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE)
    for error, code in ((PersonaError("no."), 2), (KeyboardInterrupt(), 130)):

        def stop(*_: object, error: BaseException = error, **__: object) -> None:
            assert [path.name for path in Path("outputs").iterdir()] == ["capture-llama-tiny-1"]
            raise error

        with monkeypatch.context() as stopped:
            stopped.setattr("persona_nnsight.experiments.execution.run", stop)
            assert persona(*run).code == code
        assert not Path("outputs").exists()
    assert persona(*run).code == 0
    assert Path("outputs/capture-llama-tiny-1/run.json").exists()


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
