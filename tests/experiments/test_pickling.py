"""Results, plans and grids in other processes: all of them but the model's weights."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from cells import MARKED
from commands import contents, facts
from safetensors.torch import load_file
from tiny import Tiny

import persona_nnsight
from persona_nnsight import PersonaError, Vectors, capture, reproduce, steer
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.experiments.execution import Interrupted
from persona_nnsight.experiments.registry import NAMES
from persona_nnsight.plan.data import digest
from persona_nnsight.reproduction.reproduce import ReproductionInterrupted

ONE = MARKED.select(["yoda"], ["haiku"])

ARGUMENTS: dict[str, dict[str, Any]] = {
    "capture": {"layers": (2,), "positions": "p_last,g1"},
    "substitute": {"layers": (2,), "positions": "p_last", "conditions": "bb", "window": 2},
    "inject": {"layers": (2,), "window": 2, "generate": 2},
    "markers": {"layers": (2,), "tokens": 2},
    "steer": {"layers": (2,), "alpha": "1", "window": 2},
}


def returned(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("name", NAMES)
def test_a_result_comes_back_whole(tiny: Tiny, tmp_path: Path, name: str) -> None:
    model = tiny("llama")
    seen: list[int] = []
    result = getattr(persona_nnsight, name)(
        model,
        ONE,
        **ARGUMENTS[name],
        progress=lambda done, _: seen.append(done),  # cannot be pickled
        backend=LocalBackend(model),
    )
    result.summary()  # is kept with the result
    pickled = pickle.dumps(result)
    again = pickle.loads(pickled)
    assert again.grid == result.grid
    assert again.plan == result.plan
    assert again.frame().equals(result.frame())
    assert again.summary().equals(result.summary())
    assert again.findings() == result.findings()
    result.save(tmp_path / "own")
    again.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "own")
    assert facts(tmp_path / "again") == facts(tmp_path / "own")
    # The original has its model still.
    assert result.model is model
    assert seen


def test_the_weights_stay_behind(tiny: Tiny) -> None:
    model = tiny("llama")
    result = capture(model, ONE, **ARGUMENTS["capture"])
    weights = sum(p.numel() * p.element_size() for p in model.lm._module.parameters())
    assert len(pickle.dumps(result)) < weights / 10
    again = returned(result)
    vectors = again.vectors()
    assert vectors.architecture == "llama"
    with pytest.raises(PersonaError, match=r"a pickled result.*load it by load_model"):
        steer(again.model, ONE, **ARGUMENTS["steer"])
    # What was measured is used on the model itself.
    given = steer(model, ONE, **ARGUMENTS["steer"], vectors=returned(vectors))
    own = steer(model, ONE, **ARGUMENTS["steer"], vectors=result.vectors())
    assert given.frame().equals(own.frame())
    experiment: Any = returned(given).experiment
    assert experiment.vectors.personas == vectors.personas


def test_grids_and_plans(tiny: Tiny) -> None:
    plan = capture(tiny("llama"), ONE, **ARGUMENTS["capture"]).plan
    for thing in (MARKED, ONE, plan):
        assert returned(thing) == thing


def test_what_an_interruption_left(tiny: Tiny) -> None:
    result = capture(tiny("llama"), ONE, **ARGUMENTS["capture"])
    assert returned(Interrupted({0: result})).results[0].frame().equals(result.frame())


def test_a_reproduction(tiny: Tiny, tmp_path: Path) -> None:
    made = reproduce(tiny("llama"), short=ONE, only="table1")
    again = returned(ReproductionInterrupted(made)).reproduction
    assert again.table("table1").equals(made.table("table1"))
    made.save(tmp_path / "own")
    again.save(tmp_path / "again")
    assert contents(tmp_path / "again" / "table1") == contents(tmp_path / "own" / "table1")


def test_in_a_process_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    """One that knows nothing but what it is sent."""
    result = capture(tiny("llama"), ONE, **ARGUMENTS["capture"])
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as there:
        assert there.submit(type(result).frame, result).result().equals(result.frame())
        assert there.submit(type(MARKED).to_dict, MARKED).result() == MARKED.to_dict()
        assert there.submit(digest, result.plan).result() == digest(result.plan)
        vectors = there.submit(type(result).vectors, result).result()
        assert isinstance(vectors, Vectors)
        assert vectors.delta_x["yoda"].equal(result.vectors().delta_x["yoda"])
        there.submit(type(result).save, result, tmp_path / "there").result()
    saved = load_file(tmp_path / "there" / "residuals.safetensors")
    assert saved.keys() == {f"h_{key}" for key in result.residuals}
    assert all(value.equal(saved[f"h_{key}"]) for key, value in result.residuals.items())
