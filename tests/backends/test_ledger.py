"""The record of the jobs of a run: what is written, what is read back, what is left behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_nnsight import PersonaError
from persona_nnsight.backends.ndif.ledger import DONE, SENT, WAITING, Job, Ledger
from persona_nnsight.plan.events import Event, Recorded, Scored, Written
from persona_nnsight.plan.packing import pack, unpack
from persona_nnsight.storage.journal import Journal, Origin
from persona_nnsight.storage.run_directory import check_free, save_run

EVENTS = json.dumps({"recorded": [], "scored": [[0, 1, 0.1, 2]], "written": []})
TENSORS = {"0.geometry.cos": torch.tensor([1.5, math.nan, -math.inf])}


def ledger_at(directory: Path | None) -> Ledger:
    origin = Origin(("substitute", "--grid", "ä.yaml"), "/some/where", {"model": "m 1", "é": "x"})
    journal = None if directory is None else Journal(directory, "ndif", origin)
    ledger = Ledger(journal, host="http://127.0.0.1:1", server={"dtype": "float32"})
    jobs = ledger.expect([("aa", 4), ("bb", 4), ("cc", 1)])
    jobs[0].state, jobs[0].id, jobs[0].status, jobs[0].bytes_up = DONE, "id-1", "COMPLETED", 10
    jobs[0].bytes_down, jobs[0].run_seconds, jobs[0].queue_seconds = 20, 0.5, 0.0
    jobs[1].state, jobs[1].id, jobs[1].sent, jobs[1].attempts = SENT, "id-2", 1.75e9 + 0.1, 2
    jobs[1].description, jobs[1].bytes_up = "place 3\nin the queue", 7
    return ledger


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "run"


def test_round_trip(directory: Path) -> None:
    ledger = ledger_at(directory)
    ledger.save()
    assert [path.name for path in directory.iterdir()] == ["pending.json"]
    loaded = Ledger.load(directory)
    assert loaded == ledger
    assert list(loaded.jobs) == ["aa", "bb", "cc"]
    assert loaded.journal is not None
    assert loaded.journal.argv == ["substitute", "--grid", "ä.yaml"]
    loaded.journal.origin = None
    loaded.save()
    again = Ledger.load(directory).journal
    assert again is not None
    assert again.argv is None


def test_known_jobs_are_kept(directory: Path) -> None:
    ledger = ledger_at(directory)
    jobs = ledger.expect([("bb", 4), ("dd", 2)])
    assert (jobs[0].id, jobs[0].state) == ("id-2", SENT)
    assert jobs[1] == Job("dd", 2, state=WAITING)
    assert list(ledger.jobs) == ["aa", "bb", "cc", "dd"]


def test_record(directory: Path) -> None:
    record = ledger_at(directory).record()
    assert (record["bytes_up"], record["bytes_down"]) == (17, 20)
    assert (record["host"], record["server"]) == ("http://127.0.0.1:1", {"dtype": "float32"})
    assert [job["state"] for job in record["jobs"]] == [DONE, SENT, WAITING]
    json.dumps(record)


@pytest.mark.parametrize("stopped_by", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_crash_leaves_the_old_record(
    directory: Path, monkeypatch: pytest.MonkeyPatch, stopped_by: BaseException
) -> None:
    ledger = ledger_at(directory)
    ledger.save()
    before = (directory / "pending.json").read_bytes()

    def stop(*_: Any) -> None:
        raise stopped_by

    monkeypatch.setattr(os, "replace", stop)
    ledger.jobs["cc"].state, ledger.jobs["cc"].id = SENT, "id-3"
    if isinstance(stopped_by, OSError):
        with pytest.raises(PersonaError, match=r"No space left.*jobs id-2, id-3"):
            ledger.save()
    else:
        with pytest.raises(KeyboardInterrupt):
            ledger.save()
    assert (directory / "pending.json").read_bytes() == before
    monkeypatch.undo()
    assert Ledger.load(directory).jobs["cc"].state == WAITING
    ledger.save()
    assert Ledger.load(directory).jobs["cc"].id == "id-3"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PersonaError, match="cannot be recorded in") as refused:
        ledger_at(tmp_path / "file" / "run").save()
    assert "\n" not in str(refused.value)
    assert "id-2" in str(refused.value)


def test_no_record(directory: Path) -> None:
    for path in (directory, directory.parent):
        with pytest.raises(PersonaError, match="holds no unfinished run"):
            Ledger.load(path)
    directory.mkdir(parents=True)
    with pytest.raises(PersonaError, match="holds no unfinished run"):
        Ledger.load(directory)


def changed(**changes: Any) -> str:
    job = {"key": "aa", "cells": 1, **changes.pop("job", {})}
    origin = {"argv": ["substitute"], "cwd": "/", "subject": {}}
    state = {"host": "", "server": {}, "jobs": [job]}
    state.update({name: changes.pop(name) for name in list(changes) if name in state})
    whole = {"format": 2, "backend": "ndif", "origin": origin, "state": state}
    return json.dumps({**whole, **changes})


def test_the_unchanged_record_is_fine(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "pending.json").write_text(changed())
    assert list(Ledger.load(directory).jobs) == ["aa"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "1", "{}", changed()[:-40], b"\xff\xfe\x00"),
        *(
            changed(format=1),
            changed(state=None),
            changed(state=[]),
            changed(format=None),
            changed(jobs=None),
            changed(jobs=[1]),
        ),
        *(changed(jobs={"aa": 1}), changed(server=3), changed(origin=[]), changed(origin={})),
        *(changed(job={"of_the_future": 1}), changed(origin={"argv": 1, "cwd": "", "subject": 1})),
        changed(job={"state": "somewhere"}),
    ],
)
def test_a_damaged_record(directory: Path, text: str | bytes) -> None:
    directory.mkdir(parents=True)
    (directory / "pending.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PersonaError, match="is damaged or of another version") as refused:
        Ledger.load(directory)
    assert "\n" not in str(refused.value)
    assert "pending.json" in str(refused.value)


def test_a_record_that_cannot_be_opened(directory: Path) -> None:
    (directory / "pending.json").mkdir(parents=True)
    with pytest.raises(PersonaError, match=r"pending\.json' cannot be read"):
        Ledger.load(directory)


# ------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("on_disk", [True, False])
def test_results(directory: Path, on_disk: bool) -> None:
    ledger = ledger_at(directory if on_disk else None)
    first, second, _ = ledger.jobs.values()
    assert ledger.result(first) is None
    ledger.keep(first, EVENTS, TENSORS)
    ledger.keep(second, EVENTS, {})  # a job without tensors
    for _ in range(2):
        found = ledger.result(first)
        assert found is not None
        assert found[0] == EVENTS
        torch.testing.assert_close(found[1], TENSORS, rtol=0, atol=0, equal_nan=True)
    assert ledger.result(second) == (EVENTS, {})
    ledger.save()
    assert directory.exists() == on_disk
    if on_disk:
        again = Ledger.load(directory)
        assert again.result(again.jobs["bb"]) == (EVENTS, {})
        names = [path.name for path in (directory / "parts").iterdir()]
        assert sorted(names) == ["aa.safetensors", "bb.safetensors"]


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_part_that_is_not_whole_is_none(directory: Path, kept: int) -> None:
    ledger = ledger_at(directory)
    job = ledger.jobs["aa"]
    ledger.keep(job, EVENTS, TENSORS)
    (path,) = (directory / "parts").iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    assert ledger.result(job) is None
    ledger.keep(job, EVENTS, TENSORS)
    assert ledger.result(job) is not None


def test_a_part_that_cannot_be_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_at(directory)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PersonaError, match=r"No space left on device.*jobs id-2"):
        ledger.keep(ledger.jobs["aa"], EVENTS, TENSORS)
    assert not list((directory / "parts").iterdir())


def test_events_survive_exactly(directory: Path) -> None:
    """Bit by bit, through the wire's text and the disk."""
    odd = torch.tensor([[[0.1, math.nan]], [[math.inf, -0.0]]])
    residuals = {key: torch.randn(2, 1, 2, 3) for key in ("BB", "XB", "BY", "XY")}
    residuals["XY"][0, 0, 0, 0] = math.nan
    events: list[Event] = [
        Recorded(
            (0, 1),
            ((5, 6), ()),
            ((0.1 + 0.2, 0.0), ()),
            {"cos_x_y": odd, "a.b": odd[:, :, :1].clone()},
            residuals,
        ),
        Recorded((2,), ((7,),), ((1e-45,),), {"cos_x_y": odd[:1].clone()}, None),
        Scored(0, 3, 0.1 + 0.2, 10),
        Scored(1, 0, math.nan, 0),
        Scored(2, 0, 1e-45, 1),
        Scored(2, 1, math.inf, 1),
        Written(2, 4, (1, 2, 3)),
        Written(0, 4, ()),
    ]
    ledger = ledger_at(directory)
    ledger.keep(ledger.jobs["aa"], *pack(iter(events)))
    found = ledger.result(ledger.jobs["aa"])
    assert found is not None
    back = unpack(*found, first_cell=10)
    assert [type(event) for event in back] == [type(event) for event in events]
    for event, was in zip(back, events, strict=True):
        match event, was:
            case Recorded(), Recorded():
                assert event.cells == tuple(cell + 10 for cell in was.cells)
                assert event.continuations == was.continuations
                assert (event.residuals is None) == (was.residuals is None)
                pairs = [(event.geometry, was.geometry), (event.residuals, was.residuals)]
                for tensors, others in pairs:
                    assert set(tensors or {}) == set(others or {})
                    for name, value in (tensors or {}).items():
                        expected = (others or {})[name]
                        assert value.dtype == expected.dtype == torch.float32
                        assert value.shape == expected.shape
                        assert value.numpy().tobytes() == expected.numpy().tobytes()
            case Scored(), Scored():
                assert (event.cell, event.edit) == (was.cell + 10, was.edit)
                assert event.n_tokens == was.n_tokens
                assert event.kl == was.kl or (math.isnan(event.kl) and math.isnan(was.kl))
            case Written(), Written():
                assert event == Written(was.cell + 10, was.edit, was.tokens)
            case _:
                raise AssertionError(event)


# --------------------------------------------------------------------------- the run directory


def test_discard(directory: Path) -> None:
    ledger = ledger_at(directory)
    ledger.discard()  # nothing was written yet
    ledger.save()
    ledger.keep(ledger.jobs["aa"], EVENTS, TENSORS)
    ledger.discard()
    assert not directory.exists()
    assert directory.parent.exists()
    Ledger().discard()


def test_discard_leaves_what_is_not_ours(directory: Path) -> None:
    ledger = ledger_at(directory)
    ledger.save()
    ledger.keep(ledger.jobs["aa"], EVENTS, TENSORS)
    (directory / "notes.txt").write_text("mine")
    ledger.discard()
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]


def write_run(directory: Path) -> None:
    (directory / "kl.csv").write_text("kl\n1\n")
    (directory / "run.json").write_text("{}")


def test_a_finished_run_drops_the_record(directory: Path) -> None:
    ledger = ledger_at(directory)
    ledger.save()
    ledger.keep(ledger.jobs["aa"], EVENTS, TENSORS)
    assert save_run(directory, write_run, finishes=True) == directory
    assert sorted(path.name for path in directory.iterdir()) == ["kl.csv", "run.json"]


def test_a_run_that_cannot_be_written_keeps_the_record(directory: Path) -> None:
    ledger = ledger_at(directory)
    ledger.save()
    ledger.keep(ledger.jobs["aa"], EVENTS, TENSORS)

    def fails(partial: Path) -> None:
        write_run(partial)
        raise OSError(28, "No space left on device")

    with pytest.raises(PersonaError, match="No space left"):
        save_run(directory, fails, finishes=True)
    assert sorted(path.name for path in directory.iterdir()) == ["parts", "pending.json"]
    assert ledger.result(ledger.jobs["aa"]) is not None


def test_another_run_does_not_finish_it(directory: Path) -> None:
    ledger_at(directory).save()
    for attempt in (lambda: check_free(directory), lambda: save_run(directory, write_run)):
        with pytest.raises(PersonaError, match=r"not finished.*`persona resume .*run`") as refused:
            attempt()
        assert f"persona resume {directory}" in str(refused.value)
    assert [path.name for path in directory.iterdir()] == ["pending.json"]


def test_finishing_needs_no_record(directory: Path) -> None:
    save_run(directory, write_run, finishes=True)
    assert (directory / "run.json").exists()
    with pytest.raises(PersonaError, match="already holds a run"):
        save_run(directory, write_run, finishes=True)


def test_one_process_works_on_a_run(directory: Path) -> None:
    first, second = (Ledger(Journal(directory, "ndif")) for _ in range(2))
    first.claim()
    with pytest.raises(PersonaError, match=f"worked on by process {os.getpid()};"):
        second.claim()
    with pytest.raises(PersonaError, match="being worked on"):
        Ledger.load(directory).claim()
    first.release()
    later = Ledger.load(directory)
    later.claim()
    later.discard()
    assert not directory.exists()


def test_two_runs_do_not_share_a_directory(directory: Path) -> None:
    """Both found it free when they began."""
    first, second = (Ledger(Journal(directory, "ndif")) for _ in range(2))
    first.claim()
    first.release()
    with pytest.raises(PersonaError, match="Another run has taken"):
        second.claim()
    assert sorted(path.name for path in directory.iterdir()) == ["pending.json"]
