"""The commands as a user runs them: files, standard output, errors and exit codes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cells import TINY_GRID
from commands import Persona
from rounding import KL32, tolerance
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import TinyDir

from persona_nnsight import Grid, Model, capture, inject, read_table, substitute
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.method.conditions import ROUNDED, SUBSTITUTE_CONDITIONS
from persona_nnsight.plan.costs import Limits


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_capture(persona: Persona, tiny_dir: TinyDir, tiny: Callable[..., Model]) -> None:
    outcome = persona(
        "capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-l", "2,4", "-p", "p_last,g1"
    )
    assert outcome.code == 0, outcome.err
    out = Path("outputs/capture-llama-tiny-1")
    assert files(out) == ["geometry.csv", "residuals.safetensors", "run.json", "summary.csv"]
    assert str(out) in outcome.out

    library = capture(tiny("llama"), TINY_GRID, layers=[2, 4], positions=["p_last", "g1"])
    tensors = load_file(out / "residuals.safetensors")
    assert set(tensors) == {"h_BB", "h_XB", "h_BY", "h_XY"}
    for key, value in tensors.items():
        assert value.dtype == torch.float32
        assert value.shape == (6, 2, 2, 32)
        torch.testing.assert_close(value, library.residuals[key.removeprefix("h_")])

    with safe_open(out / "residuals.safetensors", "pt") as opened:
        axes = {name: json.loads(labels) for name, labels in opened.metadata().items()}
    cells = [[cell.persona.key, cell.task.key] for cell in TINY_GRID.cells]
    assert axes == {"cells": cells, "positions": ["p_last", "g1"], "layers": [2, 4]}

    table = pd.read_csv(out / "geometry.csv")
    assert list(table) == [
        *("persona", "task", "position", "layer"),
        *("cos_xy_sum", "cos_xy_y", "cos_xy_x", "cos_xy_other", "cos_x_y"),
        *("inter_over_xy", "rest_y", "rest_x", "rest_other"),
        *("norm_dx", "norm_dy", "norm_dxy", "norm_inter", "inter_over_xy_normed"),
    ]
    pd.testing.assert_frame_equal(table, library.frame(), check_dtype=False)
    assert table["layer"].dtype == "int64"
    # By hand, for one row, in float64.
    row = table.iloc[-1]
    bb, xb, by, xy = (tensors[f"h_{key}"][-1, -1, -1].double() for key in ("BB", "XB", "BY", "XY"))
    dx, dy, dxy = xb - bb, by - bb, xy - bb
    inter = float((dxy - dx - dy).norm())
    # Effects are differences: what rounding does to them is that of the residuals.
    close = tolerance(terms=bb.numel(), size=float(bb.abs().max()) / inter)
    cosine = float(dxy @ (dx + dy)) / (float(dxy.norm()) * float((dx + dy).norm()))
    assert row["cos_xy_sum"] == pytest.approx(cosine, abs=close)
    assert row["cos_x_y"] == pytest.approx(
        float(dx @ dy) / (float(dx.norm()) * float(dy.norm())), abs=close
    )
    assert row["inter_over_xy"] == pytest.approx(inter / float(dxy.norm()), abs=close)
    assert row["norm_inter"] == pytest.approx(inter, abs=close * inter)


def test_substitute(persona: Persona, tiny_dir: TinyDir) -> None:
    outcome = persona(
        *("substitute", "-m", tiny_dir("qwen3"), "-g", "grid.yaml", "--layers", "2-3"),
        *("--positions", "p_last,g1", "--generate", 5, "--out", "here/run", "--seed", 7),
    )
    assert outcome.code == 0, outcome.err
    out = Path("here/run")
    assert files(out) == [
        *("contrasts.csv", "geometry.csv", "kl.csv", "run.json", "summary.csv", "text.jsonl")
    ]
    table = pd.read_csv(out / "kl.csv")
    columns = ["persona", "task", "condition", "host", "position", "layers", "kl", "n_tokens"]
    assert list(table) == columns
    assert (str(table["kl"].dtype), str(table["n_tokens"].dtype)) == ("float64", "int64")
    assert len(table) == 6 * len(FLOAT32_CONDITIONS) * 2 * 2
    assert not table.duplicated(columns[:6]).any()
    assert list(dict.fromkeys(table["condition"])) == FLOAT32_CONDITIONS

    summary = pd.read_csv(out / "summary.csv")
    assert list(summary) == [
        *("condition", "host", "position", "layers", "median", "median_lo", "median_hi"),
        *("q25", "q75", "min", "max", "n", "floor", "recovered", "recovered_lo", "recovered_hi"),
        "recovered_pooled",
    ]
    picked = summary[(summary["position"] == "g1") & (summary["layers"] == 3)]
    picked = picked.set_index("condition")
    at_site = table[(table["position"] == "g1") & (table["layers"] == 3)]
    kls = at_site.pivot(index=["persona", "task"], columns="condition", values="kl")
    assert kls["clean"].median() < 1e-5 < kls["bb"].min()
    assert picked["floor"].to_numpy() == pytest.approx(kls["clean"].median())
    shares = 1 - kls["additive"] / kls["bb"]
    pooled = 1 - kls["additive"].sum() / kls["bb"].sum()
    assert picked.loc["additive", "recovered"] == pytest.approx(shares.median())
    assert picked.loc["additive", "recovered_pooled"] == pytest.approx(pooled)
    assert picked.loc["bb", "recovered"] == 0

    texts = [json.loads(line) for line in (out / "text.jsonl").read_text("utf-8").splitlines()]
    assert {tuple(text) for text in texts} == {
        ("persona", "task", "condition", "position", "layers", "text", "n_tokens")
    }
    assert len(texts) == 6 * (1 + (len(FLOAT32_CONDITIONS) - 1) * 4)
    assert {text["n_tokens"] for text in texts} == {5}

    manifest = json.loads((out / "run.json").read_text("utf-8"))
    assert manifest["complete"] is True
    assert manifest["arguments"]["seed"] == 7
    assert manifest["arguments"]["margin"] == 0.1
    assert manifest["arguments"]["layers"] == [2, 3]
    assert manifest["model"]["dtype"] == "float32"
    assert manifest["model"]["sha256"]
    assert Grid.from_dict(manifest["grid"]) == TINY_GRID
    cell = manifest["cells"][0]
    assert len(cell["continuation"]) == 11
    prompt = manifest["prompts"][cell["prompts"]["XY"]]
    assert prompt["text"] == "As Yoda, write a haiku."
    assert all(isinstance(token, int) for token in prompt["ids"])
    assert {"nnsight", "torch", "transformers", "python"} <= set(manifest["versions"])
    assert manifest["peak_memory_bytes"]["host"] > 10**8
    assert manifest["seconds"]["total"] > 0


def test_inject(persona: Persona, tiny_dir: TinyDir, tiny: Callable[..., Model]) -> None:
    outcome = persona(
        *("inject", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-l", "2-4", "--each"),
        *("--personas", "yoda,marx", "--tasks", "haiku", "--json"),
    )
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)  # nothing else on standard output
    table = pd.read_csv(Path(report["out"]) / "kl.csv")
    assert list(dict.fromkeys(table["layers"])) == ["none", "2+3+4", "2", "3", "4"]
    assert len(table) == 2 * (1 + 2 * 4 + 1)
    for _, cell in table.groupby(["persona", "task"]):
        host = cell.loc[cell["condition"] == "host", "kl"].item()
        into_by = cell[cell["host"] == "BY"]
        shares = 1 - into_by["kl"].to_numpy() / host
        assert into_by["gap_closed"].to_numpy() == pytest.approx(shares)
        (clean,) = cell[cell["host"] == "XY"].to_dict("records")
        assert (clean["condition"], clean["layers"]) == ("clean", "none")
        assert abs(clean["kl"]) < 1e-5
        assert math.isnan(clean["gap_closed"])
    library = inject(
        tiny("llama"), TINY_GRID.select(["yoda", "marx"], ["haiku"]), layers="2-4", each=True
    )
    pd.testing.assert_frame_equal(table, library.frame(), check_dtype=False)
    pd.testing.assert_frame_equal(
        read_table(Path(report["out"]) / "kl.csv"), library.frame(), check_exact=False
    )
    assert [line["layers"] for line in report["summary"]] == list(library.summary()["layers"])


def test_one_cell(persona: Persona, tiny_dir: TinyDir, tiny: Callable[..., Model]) -> None:
    """The same numbers as in a grid; without a second persona there is no other_x."""
    outcome = persona(
        *("substitute", "-m", tiny_dir("llama"), "--persona", "Yoda", "--task", "write a haiku."),
        *("-l", "3", "-p", "p_last", "--json"),
    )
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    single = pd.read_csv(Path(report["out"]) / "kl.csv").set_index("condition")["kl"]
    assert set(single.index) == set(FLOAT32_CONDITIONS) - {"other_x"}
    grid = Grid.from_dict(
        {
            "name": "same",
            "personas": {"yoda": "Yoda", "other": "someone else"},
            "tasks": {"haiku": "write a haiku."},
        }
    ).select(["yoda"])
    whole = substitute(tiny("llama"), grid, layers="3", positions="p_last").frame()
    for condition, value in zip(whole["condition"], whole["kl"], strict=True):
        if condition != "other_x":
            assert single[condition] == pytest.approx(value, abs=KL32), condition


def test_a_run_can_be_repeated(persona: Persona, tiny_dir: TinyDir) -> None:
    command = ("substitute", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-l", "2", "-p", "g1")
    assert persona(*command).code == 0
    assert persona(*command).code == 0
    first, second = (Path(f"outputs/substitute-llama-tiny-{n}/kl.csv") for n in (1, 2))
    assert first.read_bytes() == second.read_bytes()


def test_dry_run(persona: Persona, tiny_dir: TinyDir, tmp_path: Path) -> None:
    """The plan needs config and tokenizer only, and leaves nothing behind."""
    import shutil

    directory = tmp_path / "weightless"
    shutil.copytree(tiny_dir("gemma2"), directory)
    (directory / "model.safetensors").unlink()
    command = ("substitute", "-m", directory, "-g", "grid.yaml", "--dry-run")
    outcome = persona(*command)
    assert outcome.code == 0, outcome.err
    assert "tiny, 6 cells" in outcome.out
    report = json.loads(persona(*command, "--json").out)
    assert report["cost"]["unique_prompts"] == 12
    assert report["cost"]["cells"] == 6
    assert report["layers"] == [1, 2, 3, 4]
    assert not Path("outputs").exists()


@pytest.mark.parametrize("limits", [Limits(cells=99, rows=99), Limits(cells=3, rows=2)])
@pytest.mark.parametrize("positions", ["p_last", "p_user_last,g3"])
@pytest.mark.parametrize("command", [capture, substitute, inject])
def test_the_dry_run_counts_what_the_run_does(
    tiny: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Any],
    positions: str,
    limits: Limits,
) -> None:
    """Forward passes and tokens, counted at the model by a hook."""
    model = tiny("llama")
    module = model.lm._module
    passes, tokens = 0, 0

    def count(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal passes, tokens
        passes += 1
        tokens += kwargs["input_ids"].numel()

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    monkeypatch.setattr(LocalBackend, "limits", lambda self, plan: limits)
    options: dict[str, Any] = {} if command is inject else {"positions": positions}
    options |= {} if command is capture else {"generate": 4}
    grid = Grid.from_dict(
        {"name": "even", "personas": {"a": "ab", "b": "cd"}, "tasks": {"x": "uv", "y": "wx"}}
        | {"baseline": {"persona": "ef", "task": "yz"}}  # equal lengths: nothing is padded
    )
    try:
        result = command(model, grid, layers="1,3", **options)
    finally:
        handle.remove()
    assert (result.cost.forward_passes, result.cost.token_forwards) == (passes, tokens)


#: Those that run where nobody chooses.
FLOAT32_CONDITIONS = [name for name in SUBSTITUTE_CONDITIONS if name != ROUNDED]

BAD = {
    "unknown condition": (["--conditions", "additive,magic"], "'magic' does not exist; use"),
    "layer out of range": (["--layers", "5"], "Layer 5 does not exist: this model has 5 layers"),
    "layer expression": (["--layers", "x"], "'x' is not understood"),
    "position": (["--positions", "g0"], "Position 'g0' does not exist"),
    "persona key": (["--personas", "yodda"], "'yodda'"),
    "task key": (["--tasks", "nope"], "'nope'"),
    "grid": (["--grid", "nope"], "'nope'"),
    "window": (["--window", "0"], "window of 0 tokens"),
    "generate": (["--generate", "-1"], "Cannot generate -1 tokens"),
    "too long": (["--window", "9000"], "has room for 4096; use shorter texts or a smaller --wind"),
    "too much text": (["--generate", "9000"], "use shorter texts or a smaller --generate"),
    "empty grid": (["--grid", ""], "no built-in grid and no file is called ''"),
    "dtype": (["--dtype", "int8"], "'int8' is not known"),
    "device": (["--device", "tpu"], "'tpu' is not known"),
    "half a cell": (["--persona", "Yoda"], "also needs --task"),
    "cell and grid": (["--persona", "Yoda", "--task", "t", "--tasks", "haiku"], "cannot go with"),
    "output file": (["--out", "grid.yaml"], "is a file"),
    "output in use": (["--out", "full"], "is not empty"),
    "output run": (["--out", "done"], "already holds a run"),
    "output below a file": (["--out", "grid.yaml/run"], "Cannot create"),
    "output name": (["--out", "x" * 300], "File name too long"),
    "model name": (["--model", "x" * 300], "is no model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(persona: Persona, tiny_dir: TinyDir, case: str, tmp_path: Path) -> None:
    options, says = BAD[case]
    for name, content in (("full", "notes.txt"), ("done", "run.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("x")
    before = sorted(tmp_path.rglob("*"))
    grid = [] if {"--grid", "--persona"} & set(options) else ["--grid", "grid.yaml"]
    outcome = persona("substitute", "-m", tiny_dir("llama"), *grid, *options)
    assert outcome.code == 2
    assert outcome.out == ""
    assert says in outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


@pytest.mark.parametrize("command", ["capture", "substitute", "inject"])
def test_bad_models(persona: Persona, command: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for spec, says in (
        ("empty", "no model directory"),
        ("./nowhere", "No such file or directory"),
        ("some-org/some-model", "not in the local hub cache"),
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
    ):
        outcome = persona(command, "--model", spec, "--grid", "grid.yaml")
        assert (outcome.code, outcome.out) == (2, "")
        assert says in outcome.err


def test_input_is_checked_before_weights_are_loaded(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    command = ("substitute", "-m", tiny_dir("llama"), "-g", "grid.yaml")
    assert persona(*command, "-p", "g0").code == 2
    assert persona(*command, "-l", "77").code == 2
    Path("outputs").write_text("not a directory")
    outcome = persona(*command)
    assert outcome.code == 2
    assert "cannot be written to 'outputs/substitute-llama-tiny-1'" in outcome.err


def test_into_the_current_directory(persona: Persona, tiny_dir: TinyDir) -> None:
    Path("empty").mkdir()
    os.chdir("empty")
    outcome = persona("capture", "-m", tiny_dir("llama"), "-g", "../grid.yaml", "-o", ".")
    assert outcome.code == 0, outcome.err
    assert files(Path()) == ["geometry.csv", "residuals.safetensors", "run.json", "summary.csv"]


def test_nothing_to_recover(persona: Persona, tiny_dir: TinyDir) -> None:
    """No share is made up where there is nothing to share: at layer 0, and without a persona."""
    model = tiny_dir("llama")
    # The input of layer 0 is the token's embedding, whatever stands before it.
    outcome = persona("substitute", "-m", model, "-g", "grid.yaml", "-l", "0", "-o", "zero")
    assert outcome.code == 0, outcome.err
    assert "recovers" not in outcome.out
    summary = pd.read_csv("zero/summary.csv").set_index("condition")
    assert summary.loc[["bb", "additive"], "median"].abs().max() < 1e-5
    assert summary["recovered"].isna().all()
    same = ("--persona", "a thoughtful person", "--task", "write.")
    outcome = persona("inject", "-m", model, *same, "-l", "2", "-o", "same")
    assert outcome.code == 0, outcome.err
    assert pd.read_csv("same/kl.csv")["gap_closed"].isna().all()


def test_empty_texts(persona: Persona, tiny_dir: TinyDir) -> None:
    for text in ("", "   "):
        outcome = persona("capture", "-m", tiny_dir("llama"), "--persona", text, "--task", "x")
        assert outcome.code == 2
        assert "empty" in outcome.err


def test_no_chat_template(persona: Persona, tiny_dir: TinyDir) -> None:
    outcome = persona("capture", "-m", tiny_dir("gpt2", chat_template=None), "-g", "grid.yaml")
    assert outcome.code == 2
    assert "has no chat template" in outcome.err


def test_nan_is_a_gap_not_a_word(persona: Persona, tiny_dir: TinyDir) -> None:
    """Windows that do not exist read back as missing numbers, and count in no summary."""
    model = tiny_dir("llama", eos_early=True)
    outcome = persona("substitute", "-m", model, "-g", "grid.yaml", "-p", "g1,g9", "-o", "run")
    assert outcome.code == 0, outcome.err
    table = pd.read_csv("run/kl.csv")
    empty = table["n_tokens"] == 0
    assert empty.any(), "every continuation reached g9: nothing was tested"
    assert table.loc[empty, "kl"].isna().all()
    assert table.loc[~empty, "kl"].notna().all()
    summary = pd.read_csv("run/summary.csv")
    line = summary[(summary["position"] == "g9") & (summary["condition"] == "bb")].iloc[0]
    assert line["n"] == (~empty & (table["position"] == "g9")).sum() / (
        len(summary) / len(set(summary["position"]))
    )
    assert math.isfinite(line["median"]) == (line["n"] > 0)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from persona_cli.app import main\n"
        "try:\n    main(['substitute', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'nnsight', 'pandas') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--conditions" in done.stdout
