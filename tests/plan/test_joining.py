"""Plans carried out together leave what each leaves alone, with less work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cells import MARKED
from rounding import KL64, assert_close, assert_same_table
from studies import study_of
from tiny import Tiny

from persona_nnsight import CaptureResult, Grid, Model, capture
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.engine.run import run
from persona_nnsight.experiments.capture import Capture
from persona_nnsight.experiments.execution import Interrupted, execute, execute_together
from persona_nnsight.experiments.inject import Inject
from persona_nnsight.experiments.markers import Markers
from persona_nnsight.experiments.results import Result
from persona_nnsight.experiments.steer import Steer
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.events import Recorded, Scored, Written
from persona_nnsight.plan.joining import join
from persona_nnsight.plan.plan import Plan
from persona_nnsight.prompts.rendering import Rendering


def studies(model: Model) -> list[tuple[Grid, Plan]]:
    """Plans over overlapping cells, in other orders, with other sites, tails and lengths."""
    part = MARKED.select(["marx"])
    return [
        (
            part,
            Substitute(layers=(2, 4), positions="p_user_last,g1", conditions="by").plan(
                model, part
            ),
        ),
        (MARKED, Inject(layers="1; 2,3").plan(model, MARKED)),
        (part, Markers(layers=(3,), tokens=5).plan(model, part)),
        (MARKED, Capture(layers=(0, 2), positions="p_last,g2", window=1).plan(model, MARKED)),
        (MARKED, Steer(layers=(1,), alpha="0,2", host="by", generate=4).plan(model, MARKED)),
    ]


def assert_same_result(joined: Result, alone: Result) -> None:
    assert joined.continuations == alone.continuations
    assert joined.texts == alone.texts
    assert set(joined.tables) == set(alone.tables)
    for name, table in joined.tables.items():
        assert_same_table(table, alone.tables[name], KL64)
    if isinstance(alone, CaptureResult):
        assert isinstance(joined, CaptureResult)
        for key, value in alone.residuals.items():
            assert_close(joined.residuals[key], value)


@pytest.mark.parametrize("limits", [Limits(cells=100, rows=100), Limits(cells=1, rows=3)])
def test_together_as_alone(tiny64: Tiny, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalBackend, "limits", lambda self, plan: limits)
    model = tiny64("llama")
    both = studies(model)
    together = execute_together(model, [study_of(*each) for each in both])
    for (grid, plan), joined in zip(both, together, strict=True):
        alone = execute(model, study_of(grid, plan))
        assert joined.plan == plan
        assert_same_result(joined, alone)


def test_what_is_shared_is_computed_once(tiny64: Tiny) -> None:
    model = tiny64("llama")
    plans = [plan for _, plan in studies(model)]
    joint = join(plans)
    texts = {prompt.text for plan in plans for prompt in plan.prompts}
    assert [prompt.text for prompt in joint.plan.prompts] == list(
        dict.fromkeys(prompt.text for plan in plans for prompt in plan.prompts)
    )
    assert len(joint.plan.prompts) == len(texts)
    assert len(joint.plan.cells) == len(MARKED.cells)
    counts: dict[type, int] = {}
    for event in run(model.lm, model.tree, joint.plan, Limits(cells=100, rows=100)):
        counts[type(event)] = counts.get(type(event), 0) + 1
    assert counts[Recorded] == 1
    scored = sum(len(p.cells) * sum(edit.scored for edit in p.edits) for p in plans)
    written = sum(len(p.cells) * sum(edit.generate > 0 for edit in p.edits) for p in plans)
    assert (counts[Scored], counts[Written]) == (scored, written)
    assert joint.plan.n_results == len(MARKED.cells) + scored + written


ONE = MARKED.select(["marx"], ["haiku"])


def plans_of_windows(model: Model) -> dict[str, Plan]:
    """Plans on one cell whose continuations have from 1 to 22 tokens."""
    return {
        "long capture": Capture(layers=(2,), positions="p_last,g2", window=20).plan(model, ONE),
        "short capture": Capture(layers=(1,), positions="p_last", window=1).plan(model, ONE),
        "late capture": Capture(layers=(1,), positions="g9", window=1).plan(model, ONE),
        "window of 6": Substitute(
            layers=(2,), positions="p_last,g2", conditions="additive,by", window=6
        ).plan(model, ONE),
        "steering of 6": Steer(layers=(2,), alpha="2", window=6, generate=12).plan(model, ONE),
        "texts": Markers(layers=(2,), tokens=15).plan(model, ONE),
    }


@pytest.mark.parametrize("eos_early", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ("long capture", "window of 6"),
        ("window of 6", "long capture"),
        ("steering of 6", "short capture"),
        ("short capture", "long capture"),
        ("texts", "long capture", "short capture"),
        ("late capture", "steering of 6"),
        ("texts", "late capture", "window of 6", "steering of 6", "long capture"),
    ],
    ids=" + ".join,
)
def test_each_keeps_the_continuation_it_asked_for(
    tiny64: Tiny, names: tuple[str, ...], eos_early: bool
) -> None:
    model = tiny64("llama", eos_early=eos_early)
    plans = [plans_of_windows(model)[name] for name in names]
    asked = max(plan.reference_tokens for plan in plans)
    assert join(plans).plan.reference_tokens == asked
    together = execute_together(model, [study_of(ONE, plan) for plan in plans])
    for plan, joined in zip(plans, together, strict=True):
        alone = execute(model, study_of(ONE, plan))
        if not eos_early:
            assert len(joined.continuations[0]) == plan.reference_tokens
        assert joined.margins == pytest.approx(alone.margins, abs=KL64)
        assert_same_result(joined, alone)


def test_plans_that_cannot_share_a_run(tiny64: Tiny) -> None:
    model = tiny64("llama")
    one = Substitute(layers=(2,), conditions="additive").plan(model, MARKED)
    with pytest.raises(ValueError, match="different windows"):
        join([one, Substitute(layers=(2,), conditions="by", window=3).plan(model, MARKED)])
    with pytest.raises(ValueError, match="end at different tokens"):
        join([one, replace(one, eos_ids=(*one.eos_ids, 7))])
    with pytest.raises(ValueError, match="rendered on different days"):
        join([one, replace(one, rendering=Rendering("2024-07-26"))])

    def other(personas: dict[str, str], **changed: Any) -> Plan:
        """The same for marx, in another grid."""
        data: dict[str, Any] = {**MARKED.to_dict(), "personas": personas, **changed}
        grid = Grid.from_dict(data).select(["marx"])
        return Substitute(layers=(2,), conditions="additive").plan(model, grid)

    marx, yoda = "Karl Marx, the author", {"yoda": "Yoda"}
    assert join([one, other({"marx": marx, **yoda})]).plan.cells == one.cells
    with pytest.raises(ValueError, match="need different residuals"):
        join([one, other({"marx": marx})])
    with pytest.raises(ValueError, match="marx/haiku has another prompt XB"):
        join([one, other({"marx": "Groucho Marx", **yoda})])
    with pytest.raises(ValueError, match="marx/haiku has another prompt OB"):
        join([one, other({"marx": marx, "chef": "a head chef", **yoda})])
    baseline = {**MARKED.to_dict()["baseline"], "task": "say something."}
    with pytest.raises(ValueError, match="marx/haiku has another prompt BB"):
        join([one, other({"marx": marx, **yoda}, baseline=baseline)])
    retold = replace(one.prompts[0], ids=(*one.prompts[0].ids, 5))
    with pytest.raises(ValueError, match="has other tokens in each plan"):
        join([one, replace(one, prompts=(retold, *one.prompts[1:]))])


def test_given_effects_belong_to_their_sites(tiny: Tiny) -> None:
    model = tiny("llama")
    vectors = capture(model, ONE, layers=(1, 2), positions="p_last").vectors()
    one = Steer(layers=(1,), alpha="1", vectors=vectors).plan(model, ONE)
    same = Steer(layers=(1,), alpha="2", vectors=vectors).plan(model, ONE)
    assert len(join([one, same]).plan.edits) == 2 * 3
    with pytest.raises(ValueError, match="given effects at different sites"):
        join([one, replace(same, layers=(1, 2))])


def test_interrupting_keeps_what_each_plan_has(tiny64: Tiny) -> None:
    model = tiny64("llama")
    both = studies(model)[:2]
    n_first = len(both[0][1].edits) * len(both[0][1].cells)

    def stop(done: int, total: int) -> None:
        if done == len(MARKED.cells) + n_first // 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        execute_together(model, [study_of(*each) for each in both], stop)
    assert set(stopped.value.results) == {0}
    kept = stopped.value.results[0]
    assert not kept.complete
    assert len(kept.frame()) == n_first // 2
    whole = execute(model, study_of(*both[0])).frame()
    merged = kept.frame().merge(whole, on=[c for c in whole if c not in ("kl", "n_tokens")])
    assert len(merged) == n_first // 2
    assert merged["kl_x"].to_numpy() == pytest.approx(merged["kl_y"].to_numpy(), abs=KL64)


def test_an_edit_runs_on_its_cells_alone(tiny64: Tiny) -> None:
    model = tiny64("llama")
    plan = Substitute(layers=(2,), positions="p_last", conditions="by").plan(model, MARKED)
    plan = replace(plan, edits=tuple(replace(edit, cells=(1, 3)) for edit in plan.edits))
    table = execute(model, study_of(MARKED, plan)).frame()
    cells = [(c.persona.key, c.task.key) for c in (MARKED.cells[1], MARKED.cells[3])]
    for condition in ("by", "clean"):
        found = table.loc[table["condition"] == condition, ["persona", "task"]]
        assert list(found.itertuples(index=False, name=None)) == cells
