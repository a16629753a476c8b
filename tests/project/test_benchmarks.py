"""The benchmark, on tiny models: what it counts and compares. Nothing is timed here."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import command, procedure
from benchmarks.comparison import Row, compare
from benchmarks.curves import CURVES, Point, Size, curve_model, curve_plan, draw
from benchmarks.floor import distinct_tokens, floor, floor_parts
from benchmarks.lengths import Lengths
from benchmarks.measure import counting, matrix_rate, measure
from benchmarks.procedure import KINDS, Count, Procedure, full_forwards, planned, scaled_seconds
from benchmarks.random_models import SPECIAL, random_model, texts_of
from benchmarks.remote import job_bytes
from benchmarks.work import Shapes, Work, shapes_of
from benchmarks.workloads import ROWS, Grids, Subset, Workload, spread, subset_of
from cells import TINY_GRID, reference_of
from edits import written_sites
from reference import grid_prompts
from rounding import KL32, assert_close, tolerance
from tiny import N_LAYERS, VOCAB_SIZE, Tiny
from transformers import Gemma2Config

from persona_nnsight import Grid, Model
from persona_nnsight.experiments.capture import Capture
from persona_nnsight.experiments.inject import Inject
from persona_nnsight.experiments.markers import Markers
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.plan.interventions import Unedited, Write
from persona_nnsight.plan.plan import CellPlan, Edit, Plan
from persona_nnsight.prompts.prompt import Prompt

MARKED = Grid.from_dict(
    {
        **TINY_GRID.to_dict(),
        "personas": {
            "yoda": {"text": "Yoda", "markers": ["e", "the"]},
            "marx": {"text": "Karl Marx, the author", "markers": ["a", "of"]},
        },
        "tasks": {
            "haiku": {"text": "write a haiku.", "tags": ["review"]},
            "review": {"text": "review this very long plan in detail.", "tags": ["review"]},
        },
    }
)
GRIDS = Grids(short=MARKED.select(["yoda"]), long=MARKED)


# ---------------------------------------------------------------------------------- the floor


def test_distinct_tokens_are_the_nodes_of_the_prefix_tree() -> None:
    # 1-2-3-4, 1-2-5, 1-2 (a prefix), 1-2-5 again, 6: nodes 1 2 3 4 5 6.
    assert distinct_tokens([(1, 2, 3, 4), (1, 2, 5), (1, 2), (1, 2, 5), (6,)]) == 6
    assert distinct_tokens([(1, 2), (3, 2)]) == 4, "the same token after another one is another"


def small_plan(**changes: Any) -> Plan:
    """One cell whose prompts are: BB 1 2 3 9, XB 1 4 3 9, BY 1 2 5 9, XY 1 4 5 9, Y 7 9."""
    ids = ((1, 2, 3, 9), (1, 4, 3, 9), (1, 2, 5, 9), (1, 4, 5, 9), (7, 9))
    keys = ("BB", "XB", "BY", "XY", "Y")
    plan = Plan(
        command="substitute",
        prompts=tuple(
            Prompt(key, tokens, len(tokens) - 2) for key, tokens in zip(keys, ids, strict=True)
        ),
        cells=(CellPlan("x", "y", {key: n for n, key in enumerate(keys)}, 0),),
        layers=(2,),
        positions=("p_last", "g2"),
        window=3,
        edits=(),
        keeps_residuals=False,
        eos_ids=(),
        pad_id=0,
        seed=0,
    )
    return replace(plan, **changes)


#: 1; 2, 4 below it; 3 and 5 below each of these; 9 below each of these; 7 and its 9.
NODES = 1 + 2 + 4 + 4 + 2


def test_floor_of_a_substitution_by_hand() -> None:
    edits = (Edit(Write("additive", ("p_last",), (2,))), Edit(Write("additive", ("g2",), (4,))))
    parts = floor_parts(small_plan(edits=edits), n_layers=6)
    assert parts == {
        "prompts": Work(NODES * 6),
        "unedited": Work(4 * 6, 5),  # five tokens are chosen, the last is not fed
        "forced": Work(3 * 2 * 6),  # BB, XB and BY as far as g2
        "edited": Work(3 * 4 + 3 * 2, 3 + 3),  # the site and two tokens, from layers 2 and 4 up
    }
    assert floor(small_plan(edits=edits), 6) == sum(parts.values(), Work())


def test_floor_starts_at_the_end_of_the_user_turn() -> None:
    edit = Edit(Write("additive", ("p_user_last",), (2,)))
    parts = floor_parts(small_plan(edits=(edit,), positions=("p_user_last",)), n_layers=6)
    assert parts["edited"] == Work((2 + 2) * 4, 3)  # user_last, p_last, two continuation tokens
    assert parts["forced"] == Work()


def test_floor_of_an_injection_by_hand() -> None:
    edits = (
        Edit(Unedited("host", ("p_last",)), host="BY"),
        Edit(Write("cached", ("p_last",), (1, 4)), host="BY"),
    )
    parts = floor_parts(small_plan(edits=edits, positions=("p_last",)), n_layers=6)
    assert parts["forced"] == Work(2 * 6, 3)  # the host's window: two tokens are fed
    assert parts["edited"] == Work(3 * 5, 3)


def test_floor_of_texts_by_hand() -> None:
    edits = (
        Edit(Unedited("clean", ("p_last",)), scored=False, generate=7),
        Edit(Write("additive", ("p_last",), (2,)), scored=False, generate=7),
        Edit(Unedited("bare", ("p_last",)), host="Y", scored=False, generate=7),
    )
    plan = small_plan(edits=edits, positions=("p_last",), window=1)
    parts = floor_parts(plan, n_layers=6)
    assert parts["unedited"] == Work(2 * 6 * 6, 2 * 7)  # XY's text holds its continuation
    assert parts["edited"] == Work(1 * 4 + 6 * 6, 7)
    ended = Lengths((1,), {(0, 0): 2, (0, 1): 1, (0, 2): 7})
    parts = floor_parts(plan, 6, ended)
    assert parts["unedited"] == Work((1 + 6) * 6, 2 + 7)
    assert parts["edited"] == Work(1 * 4, 1)


def test_floor_of_a_continuation_that_ended_early() -> None:
    edits = (Edit(Write("additive", ("p_last",), (2,))), Edit(Write("additive", ("g2",), (2,))))
    parts = floor_parts(small_plan(edits=edits), 6, Lengths((2,), {}))
    assert parts["unedited"] == Work(1 * 6, 2)
    assert parts["forced"] == Work(3 * 2 * 6)
    assert parts["edited"] == Work(2 * 4, 2), "g2 is there, and nothing follows it to be scored on"


# ----------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "gemma3_vlm", "gpt_neox"])
def test_every_token_is_counted_once_per_layer(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    module = model.lm._module
    with counting(model) as count, torch.no_grad():
        module(input_ids=torch.ones((2, 7), dtype=torch.long))
    assert count() == Work(2 * 7 * N_LAYERS, 2 * 7)
    module(input_ids=torch.ones((1, 3), dtype=torch.long))
    assert count() == Work(2 * 7 * N_LAYERS, 2 * 7), "the hooks are gone"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_are_two_for_a_weight(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    shapes = shapes_of(model)
    layers = model.lm._module.get_submodule(model.tree.layers)
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    assert shapes.flops(Work(token_layers=N_LAYERS)) == 2 * weights
    assert shapes.flops(Work(head_rows=3)) == 2 * 3 * 32 * VOCAB_SIZE
    assert matrix_rate(shapes, torch.float32, "cpu", tokens=4, repeats=1) > 0


def test_peak_is_what_a_job_holds(tiny: Tiny) -> None:
    size = 64 << 20

    def hold() -> None:
        held = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.1)  # long enough for it to be looked at
        del held

    _, measured = measure(tiny("llama"), hold)
    assert measured.peak_bytes >= 0.9 * size
    assert measured.work == Work()


# -------------------------------------------------------------------------------- the procedure


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_procedure_finds_the_references_numbers(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    reference = reference_of(model)
    mine = Procedure(model.lm._module, model.tokenizer, model.eos_ids)
    cell = TINY_GRID.cells[3]
    prompts = grid_prompts(cell.persona.text, cell.task.text, "someone", "give some advice.")

    plan = Substitute(layers="2,4", positions="p_user_last,p_last,g2").plan(model, TINY_GRID)
    additive = [n for n, edit in enumerate(plan.edits) if edit.name == "additive"]
    continuation = reference.continuation(prompts, plan.positions)
    found = mine.run_cell(plan, 3, additive, continuation)
    assert list(found.continuation) == continuation
    assert len(found.kls) == 6
    for number, value in found.kls.items():
        ((_, position, layer),) = written_sites(plan.edits[number])
        expected = reference.substitution_kl(prompts, position, layer, "additive", continuation)
        assert value == pytest.approx(expected.kl, abs=KL32)
    residual = reference.residual(
        [*reference.ids(prompts["XB"]), *continuation],
        4,
        reference.positions(prompts["XB"], "g2", continuation),
    )
    assert_close(found.residuals["XB"][2, 1], residual)

    plan = Inject(layers="2; 1,3").plan(model, TINY_GRID)
    found = mine.run_cell(plan, 3, range(len(plan.edits)), continuation[:10])
    for number, value in found.kls.items():
        edit = plan.edits[number]
        if edit.name == "clean":
            assert value == pytest.approx(0, abs=KL32)
            continue
        layers = [layer for _, _, layer in written_sites(edit)]
        one = reference.injection_kl(prompts, layers, edit.name, continuation)
        assert value == pytest.approx(one.kl, abs=KL32)

    plan = Markers(layers="2", tokens=7).plan(model, MARKED)
    texts = mine.run_cell(plan, 3, (0, 3), ()).texts
    assert list(texts[0]) == reference.greedy(reference.ids(prompts["XY"]), 7)
    assert list(texts[3]) == reference.greedy(reference.ids(cell.task.text), 7)


def counted(model: Model, plan: Plan, cell: int) -> tuple[procedure.Counts, procedure.Counts]:
    """What the procedure ran in a cell, and what `planned` says of it."""
    mine = Procedure(model.lm._module, model.tokenizer, model.eos_ids)
    prompts = {key: plan.prompts[i].text for key, i in plan.cells[cell].prompts.items()}
    continuation = mine.greedy(mine.ids(prompts["XY"]), plan.reference_tokens)
    edits = range(len(plan.edits))
    found = mine.run_cell(plan, cell, edits, continuation)
    lengths = Lengths(
        (len(continuation),) * len(plan.cells),
        {(cell, number): len(tokens) for number, tokens in found.texts.items()},
    )
    untimed = {kind: replace(count, seconds=0.0) for kind, count in mine.counts.items()}
    return untimed, planned(plan, lengths, [cell], edits)


def test_forwards_are_as_stated(tiny: Tiny) -> None:
    """The published procedure, cell by cell; tokens and rows of logits are counted too."""
    model = tiny("llama")
    long = Substitute(layers="1,2,4", conditions="additive").plan(model, MARKED)
    ran, said = counted(model, long, 2)
    assert ran == said
    assert full_forwards(ran) == 1 + 4 * 3 + 2 * 9 * 2  # additive and clean
    assert ran["step"].forwards == 11

    ran, said = counted(model, Inject(layers="2; 1,2").plan(model, MARKED), 1)
    assert ran == said
    assert full_forwards(ran) == 1 + 4 + 2 * 6  # clean too
    assert ran["step"].forwards == 9

    ran, said = counted(model, Markers(layers="2", tokens=7).plan(model, MARKED), 1)
    assert ran == said
    assert full_forwards(ran) == 4 + 4
    assert ran["step"].forwards == 4 * 6

    ran, said = counted(model, Capture(layers="all").plan(model, MARKED), 1)
    assert ran == said
    assert full_forwards(ran) == 1 + 4 * 3


def test_forwards_where_texts_end_early(tiny: Tiny) -> None:
    model = tiny("llama", eos_early=True)
    plan = Substitute(layers="2", conditions="additive").plan(model, TINY_GRID)
    short = 0
    for cell in range(len(plan.cells)):
        ran, said = counted(model, plan, cell)
        assert ran == said
        short += ran["step"].forwards < 11
    assert short, "nothing ended early: nothing was tested"


def test_seconds_are_scaled_by_counted_forwards() -> None:
    none = dict.fromkeys(KINDS, Count())
    timed = {**none, "score": Count(4, 80, 80, 2.0), "step": Count(10, 10, 10, 0.1)}
    whole = {**none, "score": Count(100, 2000, 2000), "step": Count(1000, 1000, 1000)}
    assert scaled_seconds(timed, whole) == pytest.approx(100 * 0.5 + 1000 * 0.01)
    with pytest.raises(ValueError, match="no capture forward was timed"):
        scaled_seconds(timed, {**whole, "capture": Count(1, 20, 20)})


# ------------------------------------------------------------------------------------- the rows


def test_a_subset_varies_personas_tasks_and_sites(tiny: Tiny) -> None:
    assert spread(48, 3, 6) == (0, 17, 34)
    chosen = spread(90, 9, 30)
    assert len(chosen) == 9
    assert {number // 30 for number in chosen} == {0, 1, 2}
    assert spread(4, 9, 2) == (0, 1, 2, 3)
    assert spread(0, 9, 2) == ()
    plan = Inject(layers="2; 1,2").plan(tiny("llama"), MARKED)
    assert subset_of(plan, cells=2, edits=1) == Subset((0, 3), (0, 1, 2, 3, 4, 5))


@pytest.fixture(scope="module")
def rows(tiny: Tiny) -> dict[str, Row]:
    model = tiny("llama")
    shapes, mine = shapes_of(model), Procedure(model.lm._module, model.tokenizer, model.eos_ids)

    def row(workload: Workload) -> Row:
        plan = workload.plan  # with shorter texts, to be quick
        edits = tuple(replace(edit, generate=min(edit.generate, 9)) for edit in plan.edits)
        short = replace(workload, plan=replace(plan, edits=edits))
        return compare(model, short, shapes, mine, cells=1, edits=3)

    return {name: row(make(model, GRIDS)) for name, make in ROWS.items()}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_agrees_with_the_procedure(rows: dict[str, Row], name: str) -> None:
    row = rows[name]
    agreement = row.agreement
    compared = len(row.subset.cells) * len(row.subset.edits)
    if name == "markers":
        assert agreement.texts == (compared, compared) == (4, 4)
    elif name == "capture":
        assert agreement.residual < tolerance()
    else:
        assert agreement.kls == compared > 0
        assert agreement.kl < KL32
    assert agreement.continuations[0] == agreement.continuations[1]
    assert row.ours.work.token_layers >= row.floor.token_layers
    assert row.ours.work.head_rows >= row.floor.head_rows
    assert row.published.token_layers > row.floor.token_layers
    assert row.flops["floor"] <= row.flops["ours"]
    assert full_forwards(row.whole) > full_forwards(row.timed)
    assert row.jobs
    assert min(row.jobs) > 1000


def test_a_difference_shows(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(procedure, "vector", lambda name, h: h["BB"])
    mine = Procedure(model.lm._module, model.tokenizer, model.eos_ids)
    workload = ROWS["long"](model, GRIDS)
    row = compare(model, workload, shapes_of(model), mine, cells=1, edits=3)
    assert row.agreement.kl > 0.01


def test_jobs_are_cut_as_the_backend_cuts_them(tiny: Tiny) -> None:
    model = tiny("llama")
    personas = {f"p{n}": f"person {n}" for n in range(10)}
    grid = Grid.from_dict({**TINY_GRID.to_dict(), "personas": personas})
    plan = Substitute(layers="2", conditions="additive").plan(model, grid)
    assert len(job_bytes(model, plan)) == math.ceil(len(plan.cells) / 16) == 2


# ----------------------------------------------------------------- random models and cost curves


def test_a_random_model_has_the_shape_and_does_the_work() -> None:
    config = Gemma2Config(
        vocab_size=5000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
        **SPECIAL,
    )
    texts = texts_of([MARKED])
    model = random_model("small", config, texts, device="cpu", dtype="float32")
    assert (model.attention, model.tree.vocab_size) == ("eager", 5000)
    assert model.tokenizer.decode([4999]) == "<4999>", "a generated token can be told from others"
    plan = Substitute(layers="2", conditions="additive").plan(model, MARKED)
    assert max(len(prompt.ids) for prompt in plan.prompts) < 40, "about a token a word"
    mine = Procedure(model.lm._module, model.tokenizer, model.eos_ids)
    row = compare(model, ROWS["short"](model, GRIDS), shapes_of(model), mine, cells=1, edits=2)
    assert row.agreement.kls == 2
    assert row.agreement.kl < KL32
    same = random_model("small", config, texts, device="cpu", dtype="float32")
    name, weight = next(iter(model.lm._module.named_parameters()))
    torch.testing.assert_close(dict(same.lm._module.named_parameters())[name], weight)


def test_sizes_double_the_patched_work() -> None:
    model = curve_model(8192, device="cpu", dtype="float32")

    def patched(**size: int) -> int:
        parts = floor_parts(curve_plan(model, Size(**size)), model.tree.n_layers)
        return parts["edited"].token_layers

    for name in ("cells", "layers", "positions"):
        amounts = [patched(**{name: value}) for value in CURVES[name]]
        assert amounts == [amounts[0] * 2**n for n in range(len(amounts))], name
    lengths = [
        max(len(p.ids) for p in curve_plan(model, Size(prompt_words=words)).prompts)
        for words in CURVES["prompt_words"]
    ]
    assert [b - a for a, b in pairwise(lengths)] == [32, 64, 128]


def test_curves_are_drawn(tmp_path: Path) -> None:
    found = [
        Point(curve, value, 0.1 * value, Work(value), Work(value), Work(value), float(value))
        for curve in ("cells", "layers")
        for value in (1, 2, 4)
    ]
    draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_a_table_and_keeps_the_figures(
    tiny_dir: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "grid.yaml").write_text(MARKED.to_yaml(), encoding="utf-8")
    monkeypatch.setattr(command, "matrix_rate", lambda *_: 1e9)
    kept = tmp_path / "figures.json"
    options = f"--parts rows --rows long,inject --cells 1 --edits 2 --json {kept}"
    options += f" --model {tiny_dir('llama')} --grid {tmp_path / 'grid.yaml'} --device cpu"
    command.main(options.split())
    out = capsys.readouterr().out
    assert "of 4 cells, 2 of 9 edits" in out
    assert "attention's own products are left out" in out
    figures = json.loads(kept.read_text(encoding="utf-8"))
    assert [row["name"] for row in figures["rows"]] == [
        "long grid, 3 layers",
        "inject, 5 layer sets",
    ]
    assert figures["rows"][0]["ratio"] > 0

    with pytest.raises(SystemExit, match="no built-in grid"):
        command.main(["--parts", "rows", "--model", str(tiny_dir("llama")), "--grid", "nowhere"])


def test_shapes_weigh_the_head_by_its_rows() -> None:
    shapes = Shapes(n_layers=2, maps={(3, 5): 4}, head=(3, 100))
    assert shapes.flops(Work(token_layers=2, head_rows=1)) == 2 * (2 * 2 * 15 + 300)
