"""Commands on a real NDIF server, against the same commands on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import Persona
from ndif_server import NdifServer
from rounding import PROMISED_KL
from safetensors.numpy import load_file

from persona_nnsight import Grid, read_table

pytestmark = pytest.mark.ndif

#: Of a KL in nats, cell by cell; the server's nnsight, batches and threads are its own.

SMALL = ("--grid", "short", "--personas", "yoda,marx", "--tasks", "haiku,recommend", "--layers", 16)
CONDITIONS = ("--conditions", "additive,bb,other_x,random")
COMMANDS = {
    "substitute": ("substitute", *SMALL, *CONDITIONS, "--positions", "p_user_last,p_last,g1"),
    "inject": ("inject", *SMALL, "--generate", 4),
    "capture": ("capture", *SMALL),
    "steer": ("steer", *SMALL, "--alpha", "0,1"),
}


@pytest.fixture
def two_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs so small that these grids are several."""
    monkeypatch.setattr("persona_nnsight.backends.ndif.backend._MOST_CELLS", 3)


def run_both(persona: Persona, *arguments: object) -> dict[str, object]:
    """A command here and on the server; the server's run.json."""
    for out, where in (("here", ()), ("there", ("--backend", "ndif"))):
        done = persona(*arguments, *where, "--out", out)
        assert done.code == 0, done.err
    assert sorted(p.name for p in Path("here").iterdir()) == sorted(
        p.name for p in Path("there").iterdir()
    )
    data: dict[str, object] = json.loads(Path("there/run.json").read_text())
    return data


def assert_same_tables() -> None:
    for path in Path("here").glob("*.csv"):
        here, there = read_table(path), read_table(Path("there") / path.name)
        assert list(here) == list(there)
        for name in here:
            if not pd.api.types.is_numeric_dtype(here[name]):
                assert list(here[name]) == list(there[name]), (path.name, name)
            elif name in ("kl", "median", "cos_xy_sum", "cos_x_y", "inter_over_xy"):
                gap = np.abs(here[name].to_numpy() - there[name].to_numpy())
                assert np.nanmax(gap) <= PROMISED_KL, (path.name, name)
                assert (here[name].isna() == there[name].isna()).all()


@pytest.mark.parametrize("command", COMMANDS)
def test_as_on_this_machine(
    command: str, ndif: NdifServer, persona: Persona, two_jobs: None
) -> None:
    manifest = run_both(persona, *COMMANDS[command])
    assert_same_tables()
    where = manifest["backend"]
    assert isinstance(where, dict)
    cells = pd.read_csv("here/geometry.csv")[["persona", "task"]].drop_duplicates()
    assert [job["cells"] for job in where["jobs"]] == [
        min(3, len(cells) - start) for start in range(0, len(cells), 3)
    ]
    assert all(job["attempts"] == 1 and job["state"] == "done" for job in where["jobs"])
    assert where["bytes_up"] == sum(job["bytes_up"] for job in where["jobs"]) < 200_000
    assert where["server"]["versions"]["nnsight"] == "0.8.0"
    assert manifest["model"]["dtype"] == "float32"  # type: ignore[index]
    if command == "capture":
        here, there = (load_file(f"{name}/residuals.safetensors") for name in ("here", "there"))
        assert here.keys() == there.keys()
        for key, residual in here.items():
            assert np.abs(residual - there[key]).max() <= 1e-3 * np.abs(residual).max()
    else:
        # Numbers come back, not logits: one vocabulary of them alone would be 200 kB.
        assert where["bytes_down"] < 50_000 * len(where["jobs"])


@pytest.fixture
def sandbox(ndif: NdifServer) -> Iterator[None]:
    """Jobs run as a public server runs those of people it does not know: far from the weights."""
    ndif.use_sandbox(True)
    yield
    ndif.use_sandbox(False)


@pytest.mark.parametrize("command", ["substitute", "inject"])
def test_in_the_sandbox_of_a_public_server(
    command: str, sandbox: None, ndif: NdifServer, persona: Persona
) -> None:
    run_both(persona, *COMMANDS[command])
    assert_same_tables()
    if command == "inject":
        assert Path("here/text.jsonl").read_text() == Path("there/text.jsonl").read_text()


def test_a_family_without_an_input_norm_in_the_sandbox(
    sandbox: None, ndif: NdifServer, persona: Persona, tiny_dir: Callable[..., Path]
) -> None:
    cells = ("--grid", "grid.yaml", "--model", tiny_dir("olmo2"), "--layers", "2,4")
    run_both(persona, "substitute", *cells, "--positions", "p_last,g1,g2", "--generate", 6)
    assert_same_tables()
    assert Path("here/text.jsonl").read_text() == Path("there/text.jsonl").read_text()


def test_attention_is_that_of_this_machine(
    ndif: NdifServer, persona: Persona, tiny_dir: Callable[..., Path]
) -> None:
    """Gemma 2 needs eager attention, and the server loads it with another."""
    cells = ("--grid", "grid.yaml", "--model", tiny_dir("gemma2"), "--layers", "2,4")
    manifest = run_both(persona, "substitute", *cells, "--positions", "p_last,g1")
    assert_same_tables()
    assert manifest["model"]["attention"] == "eager"  # type: ignore[index]
    # The next one finds the model as it was.
    again = persona("capture", *cells, "--attn", "sdpa", "--remote", "--out", "again")
    assert again.code == 0, again.err
    assert json.loads(Path("again/run.json").read_text())["model"]["attention"] == "sdpa"


def test_what_a_sandbox_cannot_do(
    sandbox: None, ndif: NdifServer, persona: Persona, tiny_dir: Callable[..., Path]
) -> None:
    cells = ("--grid", "grid.yaml", "--model", tiny_dir("gemma2"), "--layers", "0,2")
    done = persona("substitute", *cells, "--generate", 4, "--remote", "--out", "there")
    assert done.code == 2
    assert "eager attention was asked for" in done.err
    done = persona(
        *("substitute", *cells, "--attn", "sdpa", "--generate", 4, "--remote", "--out", "there")
    )
    assert done.code == 2
    assert "cannot do this at layer 0" in done.err
    assert not Path("there").exists()


def test_texts_are_the_same_to_the_letter(ndif: NdifServer, persona: Persona) -> None:
    grid = Grid.load("long")
    cells = ("--personas", grid.persona_keys[0], "--tasks", ",".join(grid.task_keys[:2]))
    run_both(persona, "markers", *cells, "--layers", 16, "--tokens", 12)
    assert Path("here/text.jsonl").read_text() == Path("there/text.jsonl").read_text()


def test_a_result_of_many_megabytes(ndif: NdifServer, persona: Persona) -> None:
    done = persona(
        *("capture", "--grid", "short", "--layers", "all", "--positions", "p_last,g1,g2"),
        *("--remote", "--out", "there"),
    )
    assert done.code == 0, done.err
    residuals = load_file("there/residuals.safetensors")
    assert sum(value.nbytes for value in residuals.values()) > 5e6
    assert all(np.isfinite(value).all() for value in residuals.values())
    where = json.loads(Path("there/run.json").read_text())["backend"]
    assert where["bytes_down"] > 5e6


def test_two_replicas_work_at_once(
    ndif: NdifServer, persona: Persona, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_nnsight.backends.ndif.backend._MOST_CELLS", 1)
    monkeypatch.setattr("persona_nnsight.backends.ndif.backend._JOB_TOKENS", 1)
    command = ("substitute", *SMALL, *CONDITIONS, "--remote")
    assert persona(*command, "--out", "one").code == 0
    where = json.loads(Path("one/run.json").read_text())["backend"]
    ndif.add_replica(where["model_key"])
    # A dispatcher that starts takes all replicas there are; one that runs may not hear of more.
    ndif.stop("api")
    ndif.start_api()
    ndif.wait()
    # The second is there when jobs overlap; until then it is still loading.
    for attempt in range(6):
        out = f"two-{attempt}"
        assert persona(*command, "--out", out).code == 0
        jobs = json.loads(Path(out, "run.json").read_text())["backend"]["jobs"]
        spans = sorted((job["started"], job["ended"]) for job in jobs)
        if any(later[0] < earlier[1] for earlier, later in pairwise(spans)):
            print("jobs on the server, by its clock:", [(a - spans[0][0], b - a) for a, b in spans])
            return
    pytest.fail("no two jobs overlapped")
