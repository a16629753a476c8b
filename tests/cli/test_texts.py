"""`persona markers`, `steer`, `vectors` and their files, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from cells import MARKED
from commands import Persona
from gguf import GGUFReader
from tiny import TinyDir

from persona_nnsight import Model, read_table, steer
from persona_nnsight.storage.vectors import Vectors


@pytest.fixture
def marked(persona: Persona, tmp_path: Path) -> Path:
    """The grid with markers, in the directory that the commands run in."""
    path = tmp_path / "marked.yaml"
    path.write_text(MARKED.to_yaml(), encoding="utf-8")
    return path


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_markers(persona: Persona, marked: Path, tiny_dir: TinyDir) -> None:
    outcome = persona(
        *("markers", "-m", tiny_dir("llama"), "-g", marked, "--layers", "2,4", "--tokens", 6),
        *("--out", "run"),
    )
    assert outcome.code == 0, outcome.err
    out = Path("run")
    assert files(out) == [
        *("contrasts.csv", "geometry.csv", "markers.csv", "run.json", "summary.csv", "text.jsonl")
    ]
    texts = [json.loads(line) for line in (out / "text.jsonl").read_text("utf-8").splitlines()]
    table = read_table(out / "markers.csv")
    assert len(texts) == len(table) == 4 * 6
    markers = {persona.key: persona.markers for persona in MARKED.personas}
    for text, row in zip(texts, table.to_dict("records"), strict=True):
        assert (text["persona"], text["task"]) == (row["persona"], row["task"])
        assert (text["condition"], text["layers"] or "none") == (row["condition"], row["layers"])
        words = "".join(c if c.isalnum() or c == "_" else " " for c in text["text"].lower()).split()
        hits = [marker for marker in markers[text["persona"]] if marker in words]
        assert row["hits"] == "; ".join(hits)
        assert (row["any"], row["distinct"]) == (bool(hits), len(hits))
    summary = read_table(out / "summary.csv")
    assert summary["condition"].tolist() == [
        *("clean", "additive", "additive", "remove_x", "remove_x", "bare")
    ]
    counts = table.groupby(["condition", "layers"], sort=False)["any"].sum()
    assert summary["any"].tolist() == counts.tolist()
    manifest = json.loads((out / "run.json").read_text("utf-8"))
    assert manifest["command"] == "markers"
    assert manifest["arguments"]["generate"] == 6


def test_steer_saves_what_later_runs_use(
    persona: Persona, marked: Path, tiny_dir: TinyDir, tiny: Callable[..., Model]
) -> None:
    model = tiny_dir("llama")
    first = persona(
        *("steer", "-m", model, "-g", marked, "--tasks", "haiku", "--layers", "2,4"),
        *("--alpha", "0:1:0.5", "--save-vectors", "deep/v.safetensors", "--generate", 4, "-o", "a"),
    )
    assert first.code == 0, first.err
    assert "deep/v.safetensors" in first.out
    assert "texts with marker" in first.out
    table = read_table("a/kl.csv")
    assert sorted(table["alpha"].dropna().unique()) == [0, 0.5, 1]
    assert {"markers.csv", "text.jsonl", "contrasts.csv"} <= set(files(Path("a")))

    again = persona(
        *("steer", "-m", model, "-g", marked, "--tasks", "review", "--layers", "2,4"),
        *("--host", "by", "--alpha", "1", "--vectors", "deep/v.safetensors", "-o", "b", "--json"),
    )
    assert again.code == 0, again.err
    report = json.loads(again.out)
    assert [row["condition"] for row in report["summary"]] == ["host", "steer", "clean"]
    vectors = Vectors.load("deep/v.safetensors")
    assert list(vectors.personas) == ["yoda", "marx"]
    library = steer(
        tiny("llama"),
        MARKED.select(None, ["review"]),
        layers=(2, 4),
        host="by",
        alpha=1,
        vectors=vectors,
    )
    written = pd.read_csv("b/kl.csv")
    assert written["kl"].to_numpy() == pytest.approx(library.frame()["kl"].to_numpy(), rel=1e-5)

    exported = persona("vectors", "deep/v.safetensors", "--gguf", "control", "--personas", "marx")
    assert exported.code == 0, exported.err
    reader = GGUFReader("control/marx.gguf")
    assert {tensor.name for tensor in reader.tensors} == {"direction.1", "direction.3"}
    third = next(tensor for tensor in reader.tensors if tensor.name == "direction.3")
    at = vectors.layers.index(4)
    assert third.data.tolist() == vectors.delta_x["marx"][0, at].tolist()


def test_nothing_is_overwritten(persona: Persona, marked: Path, tiny_dir: TinyDir) -> None:
    """A file that is there is refused before anything runs."""
    Path("v.safetensors").write_bytes(b"mine")
    outcome = persona(
        "steer", "-m", tiny_dir("llama"), "-g", marked, "--save-vectors", "v.safetensors"
    )
    assert outcome.code == 2
    assert "'v.safetensors' exists already" in outcome.err
    assert Path("v.safetensors").read_bytes() == b"mine"
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("markers",), "'yoda' of grid 'tiny' has no markers"),
        (("markers", "--tokens", "0"), "0 tokens"),
        (("steer", "--alpha", "1:0:1"), "--alpha '1:0:1' is no sweep"),
        (("steer", "--beta", "much"), "--beta 'much' is not understood"),
        (("steer", "--host", "bb"), "use xy"),
        (("steer", "--generate", "-3"), "Cannot generate -3 tokens"),
        (("steer", "--vectors", "none.safetensors"), "none.safetensors"),
        (("steer", "--vectors", "grid.yaml"), "grid.yaml"),
        (("steer", "--vectors", "a", "--save-vectors", "b"), "use one"),
        (("steer", "-p", "g1", "--save-vectors", "b"), "needs p_user_last or p_last"),
        (("inject", "--layers", "2;;3"), "Layer expression ''"),
        (("inject", "--layers", "2;99"), "Layer 99 does not exist"),
    ],
)
def test_bad_input(
    persona: Persona, tiny_dir: TinyDir, arguments: tuple[str, ...], said: str
) -> None:
    command, *more = arguments
    outcome = persona(command, "-m", tiny_dir("llama"), "-g", "grid.yaml", *more)
    assert outcome.code == 2, outcome.out
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not Path("outputs").exists()
    assert files(Path()) == ["grid.yaml"]
