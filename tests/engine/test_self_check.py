"""Which path rows take is measured, and what is wrong with a model does not get past it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import TINY_GRID
from commands import Persona, assert_one_sentence
from tiny import FAMILIES, Tiny, TinyDir
from torch import Tensor

from persona_nnsight import Model, PersonaError, capture, load_model, substitute
from persona_nnsight.engine import self_check
from persona_nnsight.engine.fast import kv_cache
from persona_nnsight.engine.fast.inputs import forward_inputs
from persona_nnsight.engine.self_check import find_path
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.plan.run_path import RunPath, expected_path

PLAN = Substitute(layers="all", positions="p_last,g1")


def path_of(model: Model, plan: Substitute = PLAN) -> RunPath:
    return find_path(model.lm, model.tree, plan.plan(model, TINY_GRID))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_bear_it_take_the_fast_path(tiny_dir: TinyDir, family: str, dtype: str) -> None:
    found = path_of(load_model(str(tiny_dir(family)), dtype=dtype))
    assert (found.name, found.deepest) == ("fast", 4)
    assert found.excess is not None
    assert found.excess < 0.8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["mpt", "gpt_neo", "longrope", "dynamic_rope"])
def test_models_that_do_not_take_whole_rows(tiny_dir: TinyDir, family: str, dtype: str) -> None:
    found = path_of(load_model(str(tiny_dir(family)), dtype=dtype))
    assert found.name == "whole"
    assert found.excess is not None
    assert found.excess > 2
    stretched = family in ("longrope", "dynamic_rope")
    assert found.causal == (not stretched)
    assert found.keeps_cache == (not stretched)


def test_rows_short_of_what_makes_the_difference_stay_fast(tiny: Tiny) -> None:
    """Phi-3.5 and a local window are what they are only from some length on."""
    short = TINY_GRID.select(["yoda"], ["haiku"])
    plan = Substitute(layers=(2,), positions="p_last", window=2, conditions=["additive"])
    model = tiny("longrope")
    assert max(len(prompt.ids) for prompt in plan.plan(model, short).prompts) < 85
    assert find_path(model.lm, model.tree, plan.plan(model, short)).name == "fast"
    assert path_of(model, replace(plan, window=10)).name == "whole"


def test_a_model_that_is_fed_all_its_text_again_is_decoded_anew(tiny: Tiny) -> None:
    """Its next step would undo an edit, although unedited logits are right."""
    found = path_of(tiny("openai_gpt"))
    assert (found.name, found.causal, found.keeps_cache) == ("whole", True, False)


def test_layers_that_lend_their_keys_are_not_skipped(tiny: Tiny) -> None:
    found = path_of(tiny("gemma4"))
    assert (found.name, found.deepest) == ("fast", 1)


Spoil = Callable[[pytest.MonkeyPatch], None]


def gathers_wrong(patched: pytest.MonkeyPatch) -> None:
    real = kv_cache._right_end

    def shifted(mask: Tensor, length: int) -> Tensor:
        return (real(mask, length) - 1).clamp(min=0)

    patched.setattr(kv_cache, "_right_end", shifted)


def positions_count_padding(patched: pytest.MonkeyPatch) -> None:
    def by_column(kv: Any, ids: Tensor, seen: Tensor | None = None) -> dict[str, Any]:
        inputs = forward_inputs(kv, ids, seen)
        columns = torch.arange(inputs["attention_mask"].shape[1])[-ids.shape[1] :]
        return {**inputs, "position_ids": columns.expand_as(ids)}

    patched.setattr(self_check, "forward_inputs", by_column)


def skipped_too_far(patched: pytest.MonkeyPatch) -> None:
    real = self_check._enter

    def late(chunk: Any, before: Any, ids: Tensor, feed: Tensor, entry: int) -> Any:
        if entry:
            feed = feed * 1.01
        return real(chunk, before, ids, feed, entry)

    patched.setattr(self_check, "_enter", late)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (gathers_wrong, ("whole", None)),
        (positions_count_padding, ("whole", None)),
        (skipped_too_far, ("fast", 0)),
    ],
)
def test_what_goes_wrong_is_seen(
    tiny: Tiny, spoil: Spoil, expected: tuple[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    found = path_of(tiny("llama"))
    assert found.name == expected[0]
    assert expected[1] is None or found.deepest == expected[1]


def test_what_fails_on_the_fast_path_runs_whole(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    plain = substitute(model, TINY_GRID, layers=(2,), conditions=["additive"])

    def broken(*_: Any) -> None:
        raise KeyError("shared_layer")

    monkeypatch.setattr(self_check, "_enter", broken)
    found = path_of(model)
    assert found.name == "whole"
    monkeypatch.setattr(self_check, "prefill", broken)
    found = path_of(model)
    assert found.why == "the fast path fails on this model (unknown name 'shared_layer')"
    with pytest.raises(PersonaError, match=r"fails on this model \(.*'shared_layer'\); use --path"):
        path_of(replace(model, path="fast"))
    whole = substitute(
        replace(model, path="whole"), TINY_GRID, layers=(2,), conditions=["additive"]
    )
    assert whole.continuations == plain.continuations


def test_memory_that_runs_out_is_no_verdict(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(self_check, "prefill", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        path_of(tiny("llama"))


def test_a_skeleton_says_what_it_can(tiny_dir: TinyDir) -> None:
    bare = load_model(str(tiny_dir("llama")), weights=False)
    plan = PLAN.plan(bare, TINY_GRID)
    assert expected_path(bare.tree, plan) == RunPath(why="if the model's weights agree")
    assert expected_path(replace(bare.tree, keeps_states=True), plan).name == "whole"
    assert expected_path(bare.tree, replace(plan, path="whole")).name == "whole"


def test_the_record_says_which(persona: Persona, tiny_dir: TinyDir) -> None:
    for family, name in (("llama", "fast"), ("mpt", "whole")):
        run = ("capture", "-m", str(tiny_dir(family)), "--grid", "grid.yaml", "--layers", "2")
        assert persona(*run, "--out", family).code == 0
        found = json.loads(Path(family, "run.json").read_text())["backend"]["path"]
        assert found["name"] == name
        assert (found["excess"] > 1) == (name == "whole")


def test_it_can_be_asked_for(persona: Persona, tiny_dir: TinyDir) -> None:
    run = ("capture", "-m", str(tiny_dir("llama")), "--grid", "grid.yaml", "--layers", "2")
    dry = persona(*run, "--dry-run", "--path", "whole")
    assert dry.code == 0
    assert "whole rows" in dry.out
    assert persona(*run, "--path", "whole", "--out", "out").code == 0
    found = json.loads(Path("out/run.json").read_text())["backend"]["path"]
    assert (found["name"], found["why"]) == ("whole", "asked for")
    assert_one_sentence(persona(*run, "--path", "quick"), "'quick'", "auto", "fast", "whole")


def test_what_is_asked_for_against_the_measurement_is_recorded_with_it(tiny: Tiny) -> None:
    result = capture(replace(tiny("mpt"), path="fast"), TINY_GRID, layers=(2,))
    path = result.where["path"]
    assert path["name"] == "fast"
    assert path["excess"] > 1
    assert path["why"].startswith("asked for, although ")
