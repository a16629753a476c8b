"""Random models, grids, sites and batch shapes: every number is the oracle's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import tiny
import torch
from cells import cell_prompts, reference_of
from edits import written_sites
from float64 import doubled, in_float64
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn
from reference import Reference, decomposition, kl, vector
from rounding import KL64, assert_close, tolerance
from studies import study_of
from torch import Tensor

from persona_nnsight import Grid, Model, load_model
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.engine.self_check import find_path
from persona_nnsight.experiments.capture import Capture
from persona_nnsight.experiments.execution import execute
from persona_nnsight.experiments.inject import Inject
from persona_nnsight.experiments.results import CaptureResult, EditResult, Result
from persona_nnsight.experiments.steer import Steer
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.method.conditions import INJECT_CONDITIONS, STEER, SUBSTITUTE_CONDITIONS
from persona_nnsight.method.edit_vectors import seeded_noise
from persona_nnsight.method.sites import generated_index
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.interventions import Write
from persona_nnsight.plan.plan import Edit, Plan

#: Logits of two tokens that are closer than this may be taken for each other.
CLOSE_CALL = 2 * tolerance(torch.float64)


@dataclass(frozen=True)
class Shape:
    """A tiny model."""

    family: str
    seed: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    window: int
    eos_early: bool
    path: str


@st.composite
def shapes(draw: DrawFn) -> Shape:
    heads = draw(st.sampled_from((2, 4, 6)))
    return Shape(
        family=draw(st.sampled_from(sorted(tiny.FAMILIES))),
        seed=draw(st.integers(0, 9)),
        layers=draw(st.integers(2, 4)),
        heads=heads,
        key_heads=draw(st.sampled_from([n for n in (1, 2, 3, 6) if heads % n == 0])),
        head_width=draw(st.sampled_from([8, 16] if heads == 2 else [8])),
        window=draw(st.sampled_from((4, 8, 30, 1000))),
        eos_early=draw(st.booleans()),
        path=draw(st.sampled_from(("fast", "whole"))),
    )


@contextmanager
def built(shape: Shape) -> Iterator[Model]:
    sizes = {
        "hidden_size": shape.heads * shape.head_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(tiny._TEXT, sizes))
        stack.enter_context(patch.object(tiny, "N_LAYERS", shape.layers))
        stack.enter_context(patch.object(tiny, "SLIDING_WINDOW", shape.window))
        stack.enter_context(patch.object(tiny, "MISTRAL_WINDOW", shape.window))
        stack.enter_context(patch.object(tiny, "SEED", shape.seed))
        path = Path(stack.enter_context(TemporaryDirectory()))
        tiny.make_model_dir(shape.family, path, eos_early=shape.eos_early)
        model = doubled(load_model(str(path), path=shape.path))
        stack.enter_context(in_float64())
        yield model


TEXTS = st.text("abcdé .", max_size=12).map(lambda text: f"x{text}y")


@st.composite
def grids(draw: DrawFn) -> Grid:
    opening = draw(st.sampled_from(("", "a shared opening, ")))
    keys = st.lists(TEXTS, min_size=1, max_size=4)
    return Grid.from_dict(
        {
            "name": "random",
            "template": draw(st.sampled_from(("As {persona}, {task}", "{task} As {persona}"))),
            "baseline": {"persona": opening + draw(TEXTS), "task": draw(TEXTS)},
            "personas": {f"p{n}": opening + text for n, text in enumerate(draw(keys))},
            "tasks": {f"t{n}": text * draw(st.integers(1, 3)) for n, text in enumerate(draw(keys))},
        }
    )


SITES = ("p_user_last", "p_last", "g1", "g2", "g3")


@st.composite
def plans(draw: DrawFn, model: Model, grid: Grid) -> Plan:
    layers = st.lists(st.integers(0, model.tree.n_layers - 1), min_size=1, max_size=2)
    names = st.lists(st.sampled_from(SITES), min_size=1, max_size=2)
    window, generate = draw(st.integers(1, 6)), draw(st.sampled_from((0, 0, 1, 5)))
    match draw(st.sampled_from(("capture", "substitute", "inject", "steer"))):
        case "capture":
            return Capture(layers=draw(layers), positions=draw(names), window=window).plan(
                model, grid
            )
        case "substitute":
            known = [c for c in SUBSTITUTE_CONDITIONS if c != "other_x" or len(grid.personas) > 1]
            return Substitute(
                layers=draw(layers),
                positions=draw(names),
                conditions=draw(st.lists(st.sampled_from(known), min_size=1, max_size=2)),
                window=window,
                generate=generate,
                seed=draw(st.integers(0, 3)),
            ).plan(model, grid)
        case "inject":
            sets = "; ".join(
                ",".join(map(str, chosen))
                for chosen in draw(st.lists(layers, min_size=1, max_size=2))
            )
            return Inject(
                layers=sets, each=draw(st.booleans()), window=window, generate=generate
            ).plan(model, grid)
    return Steer(
        layers=draw(layers),
        positions=draw(names),
        alpha=draw(st.lists(st.sampled_from((-1.0, 0.0, 0.5, 2.0)), min_size=1, max_size=2)),
        beta=draw(st.sampled_from((0.0, 1.0, -0.5))),
        host=draw(st.sampled_from(("xy", "by"))),
        window=window,
        generate=generate,
    ).plan(model, grid)


LIMITS = st.builds(
    Limits,
    cells=st.sampled_from((1, 2, 3, 16)),
    rows=st.sampled_from((1, 2, 5, 64)),
    tokens=st.sampled_from((1, 40, 1000)),
)


@settings(max_examples=20, phases=[Phase.explicit, Phase.generate])
@given(shape=shapes(), grid=grids(), limits=LIMITS, data=st.data())
def test_every_number_is_the_oracles(
    shape: Shape, grid: Grid, limits: Limits, data: DataObject
) -> None:
    with built(shape) as model:
        plan = data.draw(plans(model, grid))
        path = find_path(model.lm, model.tree, plan)
        assert path.name == shape.path
        assert path.causal
        assert path.keeps_cache
        chosen = replace(limits, path=path)
        with patch.object(LocalBackend, "limits", lambda self, plan: chosen):
            result = execute(model, study_of(grid, plan))
        eos = tiny.EARLY_EOS_IDS if shape.eos_early else (tiny.IM_END_ID,)
        oracle = Oracle(reference_of(model, eos), plan, grid, result)
        for cell in data.draw(some(len(plan.cells), most=2)):
            oracle.check_continuation(cell)
            oracle.check_geometry(cell, data.draw(st.integers(0, 99)))
            if isinstance(result, CaptureResult):
                oracle.check_residuals(cell, data.draw(st.integers(0, 99)))
        for number in data.draw(some(len(plan.cells) * len(plan.edits), most=4)):
            oracle.check_edit(*divmod(number, len(plan.edits)))


def some(n: int, most: int) -> st.SearchStrategy[set[int]]:
    return (
        st.sets(st.integers(0, n - 1), min_size=min(n, most), max_size=most)
        if n
        else st.just(set())
    )


@dataclass(frozen=True)
class Oracle:
    """The oracle's answers to the questions of one plan."""

    reference: Reference
    plan: Plan
    grid: Grid
    result: Result

    def prompts(self, cell: int) -> dict[str, str]:
        chosen = self.grid.cells[cell]
        return {**cell_prompts(self.grid, chosen), "Y": chosen.task.text}

    def check_continuation(self, cell: int) -> None:
        ids = self.reference.ids(self.prompts(cell)["XY"])
        expected = self.reference.greedy(ids, self.plan.reference_tokens)
        self.check_tokens(ids, self.result.continuations[cell], expected)

    def check_tokens(
        self,
        ids: Sequence[int],
        found: Sequence[int],
        expected: Sequence[int],
        edits: Mapping[int, Mapping[int, Tensor]] | None = None,
    ) -> None:
        """The same tokens, but for what follows a choice that rounding may decide."""
        for step, (mine, other) in enumerate(zip(found, expected, strict=False)):
            if mine != other:
                logits = self.reference._logits([*ids, *expected[:step]], edits)[-1]
                assert float(logits[other] - logits[mine]) < CLOSE_CALL
                return
        assert len(found) == len(expected)

    def residuals(self, cell: int, position: str, layer: int) -> dict[str, Tensor]:
        prompts = {key: text for key, text in self.prompts(cell).items() if key != "Y"}
        continuation = self.result.continuations[cell]
        return self.reference.cell_residuals(prompts, position, layer, continuation)

    def reaches(self, cell: int, position: str) -> bool:
        return generated_index(position) <= len(self.result.continuations[cell])

    def check_residuals(self, cell: int, site: int) -> None:
        assert isinstance(self.result, CaptureResult)
        p, j = site % len(self.plan.positions), site % len(self.plan.layers)
        found = {key: value[cell, p, j] for key, value in self.result.residuals.items()}
        if not self.reaches(cell, self.plan.positions[p]):
            assert all(value.isnan().all() for value in found.values())
            return
        expected = self.residuals(cell, self.plan.positions[p], self.plan.layers[j])
        for key, value in found.items():
            assert_close(value, expected[key])

    def check_geometry(self, cell: int, site: int) -> None:
        position = self.plan.positions[site % len(self.plan.positions)]
        layer = self.plan.layers[site % len(self.plan.layers)]
        table, own = self.result.geometry, self.plan.cells[cell]
        (row,) = table[
            (table["persona"] == own.persona)
            & (table["task"] == own.task)
            & (table["position"] == position)
            & (table["layer"] == layer)
        ].to_dict("records")
        if not self.reaches(cell, position):
            assert math.isnan(row["cos_xy_sum"])
            return
        h = self.residuals(cell, position, layer)
        # Where an effect is rounding, so are its angles.
        if min(float((h[key] - h["BB"]).norm()) for key in ("XB", "BY", "XY")) > 1e-6:
            for name, value in decomposition(h).items():
                assert row[name] == pytest.approx(value, abs=1e-6), (position, layer, name)

    def check_edit(self, cell: int, index: int) -> None:
        edit = self.plan.edits[index]
        prompts, continuation = self.prompts(cell), list(self.result.continuations[cell])
        host = self.reference.ids(prompts[edit.host])
        edits: dict[int, dict[int, Tensor]] = {}
        for write, position, layer in written_sites(edit):
            if self.reaches(cell, position):
                at = self.reference.positions(prompts[edit.host], position, continuation)
                edits.setdefault(layer, {})[at] = self.written(cell, write, position, layer)
        if edit.scored:
            self.check_kl(cell, index, host, edits)
        if edit.generate:
            expected = self.reference.greedy(host, edit.generate, edits)
            self.check_text(cell, edit, host, expected, edits)

    def written(self, cell: int, write: Write, position: str, layer: int) -> Tensor:
        h = self.residuals(cell, position, layer)
        if write.condition == STEER:
            persona, task = h["XB"] - h["BB"], h["BY"] - h["BB"]
            return h["BB"] + write.alpha * persona + write.beta * task
        if write.condition == "random":
            noise = seeded_noise(self.plan.cells[cell].seed, position, layer, len(h["BB"]))
            drawn: Tensor = h["BB"] + noise * ((h["XY"] - h["BB"]).norm() / noise.norm())
            return drawn
        same = {"oracle": "clean", "cached": "additive"}
        assert write.condition in {*SUBSTITUTE_CONDITIONS, *INJECT_CONDITIONS}
        return vector(same.get(write.condition, write.condition), h)

    def check_kl(
        self, cell: int, index: int, host: list[int], edits: Mapping[int, Mapping[int, Tensor]]
    ) -> None:
        assert isinstance(self.result, EditResult)
        (score,) = (s for s in self.result.scores if (s.cell, s.edit) == (cell, index))
        continuation = list(self.result.continuations[cell])
        k = generated_index(self.plan.edits[index].intervention.positions[0])
        n = max(0, min(self.plan.window, len(continuation) - k))
        assert score.n_tokens == n
        if not n:
            assert math.isnan(score.kl)
            return
        target = self.reference.ids(self.prompts(cell)["XY"])
        clean = self.reference.logprobs([*target, *continuation], len(target) + k, n)
        edited = self.reference.logprobs([*host, *continuation], len(host) + k, n, edits)
        assert score.kl == pytest.approx(kl(clean, edited), abs=KL64)

    def check_text(
        self,
        cell: int,
        edit: Edit,
        host: list[int],
        expected: list[int],
        edits: Mapping[int, Mapping[int, Tensor]],
    ) -> None:
        own = self.plan.cells[cell]
        said: tuple[object, ...] = (None, None, None, None)
        if isinstance(write := edit.intervention, Write):
            factors = (write.alpha, write.beta) if write.condition == STEER else (None, None)
            said = ("+".join(write.positions), "+".join(map(str, write.layers)), *factors)
        (text,) = (
            text
            for text in self.result.texts
            if (text.persona, text.task, text.condition) == (own.persona, own.task, edit.name)
            and (text.position, text.layers, text.alpha, text.beta) == said
        )
        decoded = self.reference.tokenizer.decode(expected, skip_special_tokens=True)
        if text.text != decoded:
            # Rounding may decide a choice; then there is one that is close.
            logits = [
                self.reference._logits([*host, *expected[:step]], edits)[-1]
                for step in range(len(expected))
            ]
            gaps = [float(top[0] - top[1]) for top in (each.topk(2).values for each in logits)]
            assert min(gaps) < CLOSE_CALL, (text.text, decoded)
        else:
            assert text.n_tokens == len(expected)
