"""Directories that somebody else prepared: nothing is written through what lies in wait there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cells import TINY_GRID
from commands import WHERE, Persona, assert_one_sentence
from tiny import Tiny, TinyDir

from persona_nnsight import PersonaError, capture
from persona_nnsight.storage.files import open_plain, our_directory, workshop, write_new
from persona_nnsight.storage.journal import Journal
from persona_nnsight.storage.run_directory import check_free, save_run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and owners of POSIX")

MINE = "mine, and not to be touched"


def link(path: Path, mine: Path) -> None:
    path.symlink_to(mine)


def second_name(path: Path, mine: Path) -> None:
    os.link(mine, path)


def pipe(path: Path, mine: Path) -> None:
    os.mkfifo(path)


def link_to_nowhere(path: Path, mine: Path) -> None:
    path.symlink_to(mine.with_name("made"))


def link_to_a_device(path: Path, mine: Path) -> None:
    path.symlink_to("/dev/null")


TRAPS = [link, second_name, pipe, link_to_nowhere, link_to_a_device]
Trap = Callable[[Path, Path], None]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of the user's elsewhere."""
    path = tmp_path / "elsewhere" / "mine"
    path.parent.mkdir()
    path.write_text(MINE)
    return path


def untouched(mine: Path) -> bool:
    return mine.read_text() == MINE and os.listdir(mine.parent) == ["mine"]


def another_users(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a directory belong to somebody else."""
    if os.geteuid() == 0:
        for each in (path, *path.rglob("*")):
            os.chown(each, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        monkeypatch.setattr("persona_nnsight.storage.files.workshop", _unwritable)


def _unwritable(_: Path) -> None:
    raise OSError


@pytest.mark.parametrize("trap", TRAPS)
def test_a_lock_is_not_opened_through_it(tmp_path: Path, mine: Path, trap: Trap) -> None:
    (tmp_path / "run").mkdir()
    trap(tmp_path / "run" / ".lock", mine)
    with pytest.raises(PersonaError, match="is not a plain file of your own"):
        Journal(tmp_path / "run", "local").claim()
    assert untouched(mine)
    assert os.listdir(tmp_path / "run") == [".lock"]
    with pytest.raises(PersonaError, match="is not empty"):
        check_free(tmp_path / "run")


def test_a_lock_of_ours_keeps_what_it_holds_until_it_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("17\n")
    os.close(open_plain(tmp_path / ".lock"))
    assert (tmp_path / ".lock").read_text() == "17\n"


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", [".pending.json.partial", "pending.json"])
def test_a_journal_is_not_written_through_it(
    tmp_path: Path, mine: Path, trap: Trap, name: str
) -> None:
    (tmp_path / "run").mkdir()
    trap(tmp_path / "run" / name, mine)
    journal = Journal(tmp_path / "run", "local")
    journal.save()
    assert untouched(mine)
    assert Journal.load(tmp_path / "run") == journal
    assert not (tmp_path / "run/pending.json").is_symlink()
    assert (tmp_path / "run/pending.json").stat().st_nlink == 1


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", ["a.partial", "a.safetensors"])
def test_a_part_is_not_written_through_it(
    tmp_path: Path, mine: Path, trap: Trap, name: str
) -> None:
    (tmp_path / "run/parts").mkdir(parents=True)
    trap(tmp_path / "run/parts" / name, mine)
    journal = Journal(tmp_path / "run", "local")
    journal.keep("a", "{}", {})
    assert journal.find("a") == ("{}", {})
    assert untouched(mine)


def test_parts_are_not_kept_in_a_directory_that_is_a_link(tmp_path: Path, mine: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/parts").symlink_to(mine.parent)
    journal = Journal(tmp_path / "run", "local")
    for take in (journal.claim, lambda: journal.keep("a", "{}", {})):
        with pytest.raises(PersonaError, match="parts' is a link, and is not written through"):
            take()
    journal.discard()
    assert untouched(mine)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_finished_run_is_not_written_through_it(tmp_path: Path, mine: Path, trap: Trap) -> None:
    """The files of a run, where an attempt that was stopped may have left some."""
    run = tmp_path / "run"
    Journal(run, "local").save()
    for name in ("kl.csv", "run.json"):
        trap(run / name, mine)
    (run / "table1").symlink_to(mine.parent)
    (run / ".partial-x").symlink_to(mine.parent)

    def write(directory: Path) -> None:
        (directory / "table1").mkdir()
        for name in ("kl.csv", "run.json", "table1/kl.csv"):
            (directory / name).write_text("new")

    save_run(run, write, finishes=True)
    assert untouched(mine)
    assert (run / "kl.csv").read_text() == "new"
    assert sorted(os.listdir(run)) == ["kl.csv", "run.json", "table1"]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_new_file_is_not_written_through_it(tmp_path: Path, mine: Path, trap: Trap) -> None:
    trap(tmp_path / "new", mine)
    with pytest.raises(PersonaError, match="exists already"):
        write_new(tmp_path / "new", lambda partial: partial.write_text("new"))
    assert untouched(mine)


def test_a_place_to_write_is_ours_alone(tmp_path: Path) -> None:
    with workshop(tmp_path) as first, workshop(tmp_path) as second:
        assert first != second
        assert first.stat().st_mode & 0o777 == 0o700


def test_a_directory_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    Journal(run, "local").save()
    (tmp_path / "empty").mkdir()
    for path in (run, tmp_path / "empty"):
        another_users(path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    for refused in (
        lambda: check_free(tmp_path / "empty"),
        Journal(tmp_path / "empty", "local").claim,
        Journal.load(run).claim,
        lambda: save_run(run, lambda _: None, finishes=True),
    ):
        with pytest.raises(PersonaError, match="belongs to another user"):
            refused()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_system_that_knows_one_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where everything belongs to one number that is not ours, so does what we make."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    our_directory(tmp_path, "go away")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_the_user_named_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").symlink_to("disk")
    our_directory(tmp_path / "outputs", "go away")
    our_directory(tmp_path / "outputs" / "run", "go away")
    assert (tmp_path / "disk" / "run").is_dir()


# ------------------------------------------------------------------------------------ commands


def test_a_prepared_directory_is_refused_before_a_model_is_loaded(
    persona: Persona, mine: Path
) -> None:
    for name in (".lock", ".pending.json.partial"):
        Path("run").mkdir(exist_ok=True)
        Path("run", name).symlink_to(mine)
        run = ("capture", "-m", "no-such-model", "-g", "grid.yaml", *WHERE, "-o", "run")
        assert_one_sentence(persona(*run), "'run' is not empty")
        Path("run", name).unlink()
    assert untouched(mine)


def test_resume_in_a_directory_of_another_user(
    persona: Persona, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(Path("run"), "local").save()
    Path("run/run.json").write_text("{}")
    another_users(Path("run"), monkeypatch)
    assert_one_sentence(persona("resume", "run"), "belongs to another user", "copy it")
    assert sorted(os.listdir("run")) == ["pending.json", "run.json"]


@pytest.fixture(scope="module")
def a_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = capture(tiny("llama"), TINY_GRID, layers=[2], positions="p_last")
    return result.save(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def run(persona: Persona, a_run: Path) -> Path:
    return Path(shutil.copytree(a_run, "run"))


@pytest.mark.parametrize("trap", TRAPS)
def test_a_report_is_not_written_through_it(
    persona: Persona, run: Path, mine: Path, trap: Trap
) -> None:
    assert persona("report", "run").code == 0
    figures = sorted(path.name for path in Path("run/figures").iterdir())
    for path in (Path("run/report.html"), *(Path("run/figures", name) for name in figures)):
        path.unlink()
        trap(path, mine)
    outcome = persona("report", "run")
    assert outcome.code == 0, outcome.err
    assert untouched(mine)
    assert sorted(path.name for path in Path("run/figures").iterdir()) == figures
    assert "<html" in Path("run/report.html").read_text()


def test_figures_are_not_written_into_a_directory_that_is_a_link(
    persona: Persona, run: Path, mine: Path
) -> None:
    Path("run/figures").symlink_to(mine.parent)
    assert_one_sentence(persona("report", "run"), "figures' is a link, and is not written through")
    assert untouched(mine)
    assert not Path("run/report.html").exists()


def test_a_report_for_another_user(
    persona: Persona, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_users(run, monkeypatch)
    assert_one_sentence(persona("report", "run"), "belongs to another user", "another --out")
    if os.geteuid() == 0:
        assert persona("report", "run", "--out", "page").code == 0


@pytest.mark.parametrize("trap", TRAPS)
def test_vectors_and_grids_are_not_written_through_it(
    persona: Persona, tiny_dir: TinyDir, mine: Path, trap: Trap
) -> None:
    trap(Path("new"), mine)
    Path("study.py").write_text("PERSONAS = {'a': 'Ada'}\nTASKS = {'t': 'Go.'}\n")
    assert_one_sentence(persona("grids", "import", "study.py", "--out", "new"), "not overwritten")
    save = ("--save-vectors", "new", "-o", "run", "-m", tiny_dir("llama"), "-g", "grid.yaml")
    assert_one_sentence(persona("steer", *save, *WHERE), "not overwritten")
    assert untouched(mine)
