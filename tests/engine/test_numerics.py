"""Values that are not finite, equal inputs, equal logits, texts that end at once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cells import TINY_GRID, cell_prompts, lookup, reference_of
from commands import Persona
from reference import Reference
from rounding import KL64
from safetensors.torch import load_file, save_file
from tiny import EARLY_EOS_IDS, Tiny, make_model_dir
from torch import Tensor

from persona_nnsight import Grid, Model, capture, load_model, substitute
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.errors import PersonaError
from persona_nnsight.plan.costs import Limits

Change = Callable[[dict[str, Tensor]], None]

NAN, INF = float("nan"), float("inf")

#: 'Q' is in the baseline persona alone, 'Z' in one persona alone, 'V' in one task alone.
GRID = Grid.from_dict(
    {
        "name": "tiny",
        "baseline": {"persona": "Q someone", "task": "give some advice."},
        "personas": {
            "yoda": {"text": "Yoda", "markers": ["force"]},
            "zoe": {"text": "Zoe", "markers": ["force"]},
        },
        "tasks": {"haiku": "write a haiku.", "verse": "Verse please."},
    }
)

COMMANDS = {
    "capture": ["capture"],
    "substitute": ["substitute", "--positions", "p_last,g1"],
    "inject": ["inject"],
    "markers": ["markers", "--tokens", "4"],
    "steer": ["steer", "--alpha", "0,1"],
}


def spoilt(directory: Path, change: Change) -> Path:
    """A llama of five layers some of whose weights are changed."""
    make_model_dir("llama", directory)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def token(model: Model, character: str) -> int:
    (found,) = model.tokenizer(character, add_special_tokens=False)["input_ids"]
    return int(found)


def put(name: str, index: Any, value: float) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name][index] = value

    return change


def refusal(persona: Persona, *arguments: object) -> str:
    """What a command says that stops; nothing is left of it."""
    Path("grid.yaml").write_text(GRID.to_yaml(), encoding="utf-8")
    outcome = persona(*arguments, "--grid", "grid.yaml", "--out", "out")
    assert (outcome.code, outcome.out) == (2, "")
    assert not Path("out").exists()
    said = outcome.err.splitlines()[-1]
    assert said.startswith("persona: ")
    return said


WEIGHT, EMBEDDING, HEAD = (
    "model.layers.2.mlp.down_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("value", "layers"), [(NAN, "2"), (-INF, "3")], ids=str)
def test_a_weight_that_is_not_finite(
    persona: Persona, tmp_path: Path, command: str, value: float, layers: str
) -> None:
    """Layer 2 reads what comes before the bad weight, layer 3 is the first after it."""
    model = spoilt(tmp_path / "m", put(WEIGHT, (3, 5), value))
    said = refusal(persona, *COMMANDS[command], "--model", model, "--layers", layers)
    # Where it is asked for, or where it comes up first.
    position = "p_last" if layers == "3" else "before p_last"
    where = f"of the XY prompt of cell yoda/haiku is not finite at layer 3, position {position}"
    assert where in said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("character", "where"),
    [
        (
            "Q",
            "residual of the BB prompt of cell yoda/haiku is not finite at layer 2, position p_l",
        ),
        ("Z", "residual of the XY prompt of cell zoe/haiku is not finite at layer 2, position p_l"),
        (
            "V",
            "residual of the XY prompt of cell yoda/verse is not finite at layer 2, position p_l",
        ),
    ],
    ids=["baseline", "persona", "task"],
)
def test_an_embedding_that_is_not_finite(
    persona: Persona, tiny: Tiny, tmp_path: Path, command: str, character: str, where: str
) -> None:
    model = spoilt(tmp_path / "m", put(EMBEDDING, (token(tiny("llama"), character), 0), NAN))
    assert where in refusal(persona, *COMMANDS[command], "--model", model, "--layers", "2")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_an_output_row_that_is_not_finite(
    persona: Persona, tmp_path: Path, command: str, value: float
) -> None:
    model = spoilt(tmp_path / "m", put(HEAD, 7, value))
    said = refusal(persona, *COMMANDS[command], "--model", model, "--layers", "2")
    assert "The output of the XY prompt of cell yoda/haiku is not finite after layer 4" in said


def test_an_unedited_host_that_is_not_finite(persona: Persona, tiny: Tiny, tmp_path: Path) -> None:
    # At layer 0 the sites are what they should be: they do not see the other tokens yet.
    model = spoilt(tmp_path / "m", put(EMBEDDING, (token(tiny("llama"), "Q"), 0), NAN))
    said = refusal(persona, "inject", "--model", model, "--layers", "0")
    where = "of the BY prompt of cell yoda/haiku is not finite at layer 0, position before p_last"
    assert where in said


def test_an_edit_that_overflows(persona: Persona, tiny_dir: Callable[..., Path]) -> None:
    said = refusal(
        persona, "steer", "--model", tiny_dir("llama"), "--layers", "2", "--alpha", "1,1e38"
    )
    assert "The output of cell yoda/haiku under 'steer' is not finite after the edit" in said
    assert "at layer 2, position p_last" in said


def texts_of(reference: Reference) -> dict[str, list[int]]:
    """Greedy tokens of the first cell's texts, as `markers` writes them at layer 2."""
    prompts = cell_prompts(GRID, GRID.cells[0])
    ids = reference.ids(prompts["XY"])
    h = reference.cell_residuals(prompts, "p_last", 2, [])
    edits = {2: {len(ids) - 1: h["BY"] + h["XB"] - h["BB"]}}
    return {
        "clean": reference.greedy(ids, 12),
        "additive": reference.greedy(ids, 12, edits),
        "bare": reference.greedy(reference.ids(GRID.cells[0].task.text), 12),
    }


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            "clean",
            r"residual of the XY prompt of cell yoda/haiku is not finite at layer 0, position",
        ),
        ("additive", r"output of cell yoda/haiku under 'additive' is not finite after the edit at"),
        ("bare", r"residual of the Y prompt of cell yoda/haiku is not finite at layer 0, position"),
    ],
)
def test_a_text_that_is_not_finite(
    persona: Persona, tiny: Tiny, tmp_path: Path, text: str, where: str
) -> None:
    """A token that stands in one text alone, beyond the tokens that are recorded."""
    texts = texts_of(reference_of(tiny("llama")))
    others = {one for name, other in texts.items() if name != text for one in other}
    bad = next(one for one in texts[text][2:-1] if one not in {*others, *texts[text][:2]})
    model = spoilt(tmp_path / "m", put(EMBEDDING, (bad, 0), NAN))
    Path("one.yaml").write_text(GRID.to_yaml(), encoding="utf-8")
    arguments = ["--model", model, "--layers", "2", "--personas", "yoda", "--tasks", "haiku"]
    assert where in refusal(persona, "markers", *arguments, "--tokens", "12")
    if text != "bare":
        options = ["--generate", "12", "--window", "1", "--positions", "p_last"]
        said = refusal(persona, "substitute", *arguments, *options, "--conditions", "additive")
        assert where in said


def test_geometry_that_overflows(tmp_path: Path) -> None:
    """A residual may be finite where its length is not."""

    def grow(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.self_attn.o_proj.weight"] *= 1e22

    model = load_model(str(spoilt(tmp_path / "m", grow)))
    with pytest.raises(
        PersonaError, match=r"geometry '.*' of cell yoda/haiku is not finite at lay"
    ):
        capture(model, GRID, layers=(1,), positions="p_last")


# ------------------------------------------------------------------------------- determinism

_RUNS = """
import sys, torch
from persona_cli.app import main

model, runs = sys.argv[1], {
    "capture": ["capture", "--positions", "p_last,g1"],
    "substitute": ["substitute", "--positions", "p_last,g1", "--generate", "6"],
    "steer": ["steer", "--alpha", "0,1"],
    "markers": ["markers", "--tokens", "6"],
}
for threads, names in {1: list(runs), 2: ["capture", "substitute"]}.items():
    torch.set_num_threads(threads)
    for name in names:
        where = ["--model", model, "--grid", "grid.yaml", "--out", f"{name}-{threads}"]
        try:
            main([*runs[name], *where, "--layers", "1,3", "--memory-budget", "1GB"])
        except SystemExit as stopped:
            assert not stopped.code
"""

#: What of run.json is about the time and the process.
_OWN = ("finished", "seconds", "peak_memory_bytes")


def files_of(directory: Path, model: Path, seed: int) -> dict[str, bytes]:
    """The files of some runs in a process of their own."""
    directory.mkdir()
    (directory / "grid.yaml").write_text(GRID.to_yaml(), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(seed),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_WAIT_POLICY": "passive",  # two threads, on however few cores there are
    }
    command = [sys.executable, "-c", _RUNS, str(model)]
    subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)
    found = {}
    for path in sorted(directory.glob("*/*.*")):
        content = path.read_bytes()
        if path.name == "run.json":
            facts = json.loads(content)
            content = json.dumps({k: v for k, v in facts.items() if k not in _OWN}).encode()
        found[f"{path.parent.name}/{path.name}"] = content
    return found


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    """In batches of one size, which is why a memory budget is given."""
    model = tiny_dir("llama")
    first, second = (files_of(tmp_path / str(seed), model, seed) for seed in (1, 2))
    assert {name.partition("/")[2] for name in first} == {
        *("kl.csv", "summary.csv", "contrasts.csv", "geometry.csv", "markers.csv", "text.jsonl"),
        *("residuals.safetensors", "run.json"),
    }
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


# -------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("limits", [Limits(1, 1), Limits(2, 5), Limits(16, 64)], ids=str)
def test_of_equal_logits_the_lowest_token_is_taken(
    tmp_path: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token has a twin of the next number with the same row of the output embedding."""

    def pair(weights: dict[str, Tensor]) -> None:
        head = weights[HEAD]
        twins = torch.arange(len(head)) // 2
        # One weight a row: a logit is then one product, whose value no order of adding up changes.
        alone = head[2 * twins, twins % head.shape[1]]
        head.zero_()
        head[torch.arange(len(head)), twins % head.shape[1]] = alone

    model = load_model(str(spoilt(tmp_path / "m", pair)))
    reference = reference_of(model)
    monkeypatch.setattr(LocalBackend, "limits", lambda self, plan: limits)
    result = substitute(
        model, TINY_GRID, layers=(2,), positions="p_last,g1", conditions="by", generate=5, window=4
    )
    for index, cell in enumerate(TINY_GRID.cells):
        prompts = cell_prompts(TINY_GRID, cell)
        continuation = list(result.continuations[index])
        assert continuation == reference.greedy(reference.ids(prompts["XY"]), 5)
        assert all(one % 2 == 0 for one in continuation)
        assert result.margins[index] == 0
        clean = next(
            text
            for text in result.texts
            if (text.persona, text.task, text.condition)
            == (cell.persona.key, cell.task.key, "clean")
        )
        assert clean.text == model.tokenizer.decode(continuation, skip_special_tokens=True)


def test_the_closest_choice_is_recorded(tiny64: Tiny, tmp_path: Path) -> None:
    model = tiny64("llama", eos_early=True)
    reference = reference_of(model, EARLY_EOS_IDS)
    result = capture(model, TINY_GRID, layers=(2,), positions="p_last,g1", window=4)
    saved = json.loads((result.save(tmp_path / "run") / "run.json").read_text("utf-8"))
    for index, cell in enumerate(TINY_GRID.cells):
        ids = reference.ids(cell_prompts(TINY_GRID, cell)["XY"])
        tokens = list(result.continuations[index])
        logits = reference._logits([*ids, *tokens])[len(ids) - 1 : -1]
        first, second = logits.topk(2).values.unbind(-1)
        assert result.margins[index] == pytest.approx(float((first - second).min()), abs=KL64)
        assert saved["cells"][index]["smallest_margin"] == result.margins[index]


# ------------------------------------------------------------------ texts that end very early


@pytest.mark.parametrize("ending", ["at once", "after two", "at once in one cell"])
def test_texts_that_end_early(tiny64: Tiny, tmp_path: Path, ending: str) -> None:
    endless = tiny64("llama")
    reference = reference_of(endless)
    prompts = [cell_prompts(TINY_GRID, cell) for cell in TINY_GRID.cells]
    greedy = [reference.greedy(reference.ids(each["XY"]), 4) for each in prompts]
    eos = {
        "at once": {tokens[0] for tokens in greedy},
        "after two": {tokens[1] for tokens in greedy},
        "at once in one cell": {greedy[0][0]},
    }[ending]
    reference.eos = frozenset(eos)
    model = replace(endless, eos_ids=tuple(sorted(eos)))
    positions = ("p_last", "g1", "g2")
    result = substitute(
        model,
        TINY_GRID,
        layers=(2,),
        positions=positions,
        conditions="additive,bb",
        window=3,
        generate=4,
    )
    found, captured = lookup(result), capture(model, TINY_GRID, layers=(2,), positions=positions)
    by_site: dict[str, list[float]] = {position: [] for position in positions}
    for index, cell in enumerate(TINY_GRID.cells):
        continuation = reference.continuation(prompts[index], positions, window=3)
        assert list(result.continuations[index]) == continuation
        for k, position in enumerate(positions):
            value, n_tokens = found[cell.persona.key, cell.task.key, "bb", position, "2"]
            assert n_tokens == max(0, min(3, len(continuation) - k))
            reached = k <= len(continuation)
            assert captured.residuals["XY"][index, k].isnan().all() != reached
            if not n_tokens:
                assert math.isnan(value)
                continue
            expected = reference.substitution_kl(
                prompts[index], position, 2, "bb", continuation, window=3
            )
            assert expected.n_tokens == n_tokens
            assert value == pytest.approx(expected.kl, abs=KL64)
            by_site[position].append(expected.kl)
    lengths = [len(tokens) for tokens in result.continuations.values()]
    assert (min(lengths), max(lengths)) == {
        "at once": (1, 1),
        "after two": (min(lengths), 2),
        "at once in one cell": (1, 5),
    }[ending]
    for row in result.summary().to_dict("records"):
        if row["condition"] == "bb":
            kls = by_site[row["position"]]
            assert row["n"] == len(kls)
            median = pd.Series(kls, dtype=float).median()
            assert row["median"] == pytest.approx(median, nan_ok=True, abs=KL64)
    for row in captured.summary().to_dict("records"):
        k = positions.index(row["position"])
        assert row["n"] == sum(length >= k for length in lengths)
    saved = json.loads((result.save(tmp_path / "run") / "run.json").read_text("utf-8"))
    assert [cell["continuation"] for cell in saved["cells"]] == list(
        map(list, result.continuations.values())
    )
