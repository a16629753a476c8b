"""The paper's tables on a tiny model, and our numbers beside the published ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cells import TINY_GRID
from commands import Persona
from rounding import KL32, assert_same_table
from studies import study_of
from tiny import Tiny, TinyDir

from persona_nnsight import Grid, Model, PersonaError, inject, read_table, substitute
from persona_nnsight.engine.run import run
from persona_nnsight.experiments.execution import execute
from persona_nnsight.experiments.markers import markers
from persona_nnsight.reproduction import protocol
from persona_nnsight.reproduction.protocol import (
    TABLES,
    edited_layer,
    has_paper_stimuli,
    layer_sets,
    parse_targets,
    plan_table,
    reference_layers,
)
from persona_nnsight.reproduction.published import (
    PAPER_MODELS,
    REFERENCE_MODEL,
    paper_model,
    published,
)
from persona_nnsight.reproduction.reproduce import Reproduction, ReproductionInterrupted, reproduce

LONG = Grid.from_dict(
    {
        "name": "tiny-long",
        "personas": {
            "engineer": {"text": "an engineer", "markers": ["a", "latency"]},
            "chef": {"text": "a head chef", "markers": ["e", "mise en place"]},
            "lawyer": {"text": "a lawyer", "markers": ["o", "liability"]},
        },
        "tasks": {
            "arch": {"text": "review this design.", "tags": ["review"]},
            "plan": {"text": "review this very long plan.", "tags": ["review"]},
            "haiku": "write a haiku.",
        },
    }
)


@pytest.fixture(scope="module")
def made(tiny: Tiny) -> Reproduction:
    return reproduce(tiny("llama"), short=TINY_GRID, long=LONG)


def on_paper_model(model: Model, model_id: str, n_layers: int) -> Model:
    """The same weights under the name, and with the depth, of one of the paper's models."""
    weights = replace(model.weights, model_id=model_id)
    return replace(model, weights=weights, tree=replace(model.tree, n_layers=n_layers))


def test_layers_are_the_papers_own_on_its_models(tiny: Tiny) -> None:
    """docs/method.md §10, typed in by hand."""
    expected: dict[str, tuple[int, list[int], list[int]]] = {
        PAPER_MODELS[0]: (26, [6, 10, 14, 18, 22], [10, 14, 18]),
        PAPER_MODELS[1]: (28, [7, 11, 15, 20, 24], [7, 15, 20]),
        PAPER_MODELS[2]: (36, [9, 14, 20, 25, 31], [14, 20, 25]),
    }
    for model_id, (n_layers, table1, table2) in expected.items():
        model = on_paper_model(tiny("llama"), model_id, n_layers)
        assert list(plan_table("table1", model, TINY_GRID, LONG).plan.layers) == table1
        assert list(plan_table("table2", model, TINY_GRID, LONG).plan.layers) == table2
        for table, layers in (("table1", table1), ("table2", table2)):
            theirs = published(table, model_id)
            if len(theirs):
                assert theirs["layers"].unique().tolist() == list(map(str, layers))
    assert edited_layer(26) == 14
    assert layer_sets(26) == (
        (14,),
        (10, 12, 14),
        (10, 12, 14, 16, 18),
        (10, 12, 14, 16, 18, 20, 22),
        (6, 8, 10, 12, 14, 16, 18, 20, 22),
    )


def test_layers_on_another_model() -> None:
    """One scale for all tables: layer 14 of Tables 3 and 4 stands where Table 1's does."""
    for n_layers in (12, 24, 30, 36, 48):
        middle = reference_layers("table1", n_layers)["14"]
        assert str(edited_layer(n_layers)) == middle
        assert reference_layers("table4", n_layers)["14"] == middle
    assert edited_layer(30) == 16
    assert layer_sets(30)[1] == (12, 14, 16)
    assert reference_layers("table1", 30) == {
        **{"": "", "6": "8", "10": "12", "14": "16", "18": "21", "22": "26"}
    }
    assert reference_layers("table2", 30) == {"": "", "10": "12", "14": "16", "18": "21"}
    assert reference_layers("table4", 30)["10+12+14"] == "12+14+16"


def test_the_protocol(tiny: Tiny) -> None:
    model = tiny("llama")
    studies = {table: plan_table(table, model, TINY_GRID, LONG) for table in TABLES}
    assert studies["table1"].plan.positions == ("p_user_last", "p_last", "g1", "g2")
    assert studies["table2"].plan.positions == ("p_last", "g1", "g2")
    assert {study.plan.window for study in studies.values() if study.name != "table3"} == {10}
    assert len(studies["table2"].plan.cells) == 9
    for table in ("table3", "table4"):  # the review tasks alone
        assert [cell.task for cell in studies[table].plan.cells] == ["arch", "plan"] * 3
    texts = studies["table3"].plan.edits
    assert [(edit.name, edit.host, edit.generate) for edit in texts] == [
        *(("clean", "XY", 80), ("additive", "XY", 80), ("remove_x", "XY", 80), ("bare", "Y", 80))
    ]
    hosts = {(edit.name, edit.host) for edit in studies["table4"].plan.edits}
    # The clean run beside them is the floor.
    assert hosts == {("host", "BY"), ("oracle", "BY"), ("cached", "BY"), ("clean", "XY")}


def test_tables_are_those_of_the_commands(tiny: Tiny, made: Reproduction) -> None:
    """Shared work changes nothing: each table is what its own command gives."""
    model, reviews = tiny("llama"), LONG.select(None, ["arch", "plan"])
    table2 = made.studies["table2"].plan
    conditions = list(dict.fromkeys(edit.name for edit in table2.edits))
    layers = tuple(table2.layers)
    alone = substitute(model, LONG, layers=layers, conditions=conditions)
    assert_same_table(made.results["table2"].frame(), alone.frame(), KL32)
    edited = edited_layer(model.tree.n_layers)
    texts = markers(model, reviews, layers=edited, tokens=80).texts
    assert made.results["table3"].texts == texts
    sets = "; ".join(",".join(map(str, chosen)) for chosen in layer_sets(model.tree.n_layers))
    assert_same_table(
        made.results["table4"].frame(), inject(model, reviews, layers=sets).frame(), KL32
    )
    table1 = made.studies["table1"]
    assert_same_table(
        made.results["table1"].frame(),
        execute(model, study_of(table1.grid, table1.plan)).frame(),
        KL32,
    )


def test_beside_another_model_there_is_no_difference(made: Reproduction) -> None:
    for name in TABLES:
        table = made.table(name)
        assert set(table["published_model"]) == {REFERENCE_MODEL}
        assert table["published"].notna().any()
        assert table["difference"].isna().all()
        assert not table["same_stimuli"].any()
        keys = ["position", "layers", "condition", "persona", "task", "measure"]
        assert not table.duplicated(keys).any()


def test_beside_the_same_model_the_difference_is_ours_minus_theirs(made: Reproduction) -> None:
    """The tiny model's numbers under Gemma's name and layers."""
    gemma = on_paper_model(made.model, "Google/Gemma-2-2b-it", 26)
    plan = made.studies["table2"].plan
    names = dict(zip(map(str, plan.layers), ("10", "14", "18"), strict=False))
    result = replace(made.results["table2"], model=gemma)
    tables = {name: table.copy() for name, table in result.tables.items()}
    for table in tables.values():
        for column in ("layers", "layer"):
            if column in table:
                renamed = table[column].astype(str).map(names)
                table[column] = renamed if column == "layers" else renamed.astype(int)
    result = replace(result, geometry=tables["geometry"])
    result.__dict__["tables"] = tables
    changed = replace(made, results={"table2": result})
    table = changed.table("table2")
    both = table[table["published"].notna()]
    assert len(both) > 20
    assert (both["published_layers"] == both["layers"]).all()
    assert both["difference"].to_numpy() == pytest.approx(
        (both["value"] - both["published"]).to_numpy()
    )
    row = both[
        (both["position"] == "g1")
        & (both["layers"] == "10")
        & (both["measure"] == "kl")
        & (both["persona"] == "")
        & (both["task"] == "")
    ]
    assert row["published"].round(3).tolist() == [0.017]  # Xu 2026, Table 2
    group = both[(both["persona"] == "chef") & (both["layers"] == "14")]
    ours = result.frame()
    mine = ours[(ours["persona"] == "chef") & (ours["layers"] == "14")]
    medians = mine[mine["condition"] == "additive"].groupby("position")["kl"].median()
    assert group.set_index("position")["value"].to_dict() == pytest.approx(medians.to_dict())


def test_the_papers_stimuli_are_known() -> None:
    short = Grid.load("short")
    assert has_paper_stimuli(short, "table1")
    assert not has_paper_stimuli(short.select(["yoda"]), "table1")
    for table in TABLES[1:]:
        assert not has_paper_stimuli(short, table)
        assert not has_paper_stimuli(Grid.load("long"), table)
    data: dict[str, Any] = Grid.load("short").to_dict()
    data["tasks"]["haiku"] += "!"
    assert not has_paper_stimuli(Grid.from_dict(data), "table1")


def test_the_papers_long_grid_needs_no_tags(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    """Its file tags no tasks as reviews: they are known by their keys."""
    data = LONG.to_dict()
    data["tasks"] = {"arch": "one.", "plan": "two.", "proposal": "three.", "haiku": "four."}
    untagged = Grid.from_dict(data)
    with pytest.raises(PersonaError, match="tagged 'review'"):
        plan_table("table4", tiny("llama"), TINY_GRID, untagged)
    monkeypatch.setitem(protocol._STIMULI, "table2", protocol._digest(untagged))
    study = plan_table("table4", tiny("llama"), TINY_GRID, untagged)
    assert study.grid.task_keys == ("arch", "plan", "proposal")


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (None, TABLES),
        ("table3", ("table3",)),
        ("table4, table1", ("table1", "table4")),
        ("figure1", ("table1", "table2")),
        (["figure1", "table3"], ("table1", "table2", "table3")),
    ],
)
def test_targets(only: Any, expected: tuple[str, ...]) -> None:
    assert parse_targets(only) == expected


@pytest.mark.parametrize("only", ["table5", "", "table1,,table2", []])
def test_bad_targets(only: Any) -> None:
    with pytest.raises(PersonaError, match="use table1, table2, table3, table4, figure1"):
        parse_targets(only)


def test_a_long_grid_without_reviews(tiny: Tiny) -> None:
    with pytest.raises(PersonaError, match="tagged 'review', and grid 'tiny' has none"):
        reproduce(tiny("llama"), short=TINY_GRID, long=TINY_GRID, only="table4")


def test_interrupting(tiny: Tiny) -> None:
    """What the first pass made is whole; of the second, what is finished is kept."""

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 6 + first + 9 + 10:
            raise KeyboardInterrupt

    seen: list[tuple[int, int]] = []
    model = tiny("llama")
    first = plan_table("table1", model, TINY_GRID, LONG).plan.n_results - 6
    with pytest.raises(ReproductionInterrupted) as stopped:
        reproduce(model, short=TINY_GRID, long=LONG, only="figure1,table4", progress=stop)
    kept = stopped.value.reproduction
    assert not kept.complete
    assert kept.results["table1"].complete
    assert not kept.results["table2"].complete
    assert len(kept.results["table2"].frame()) == 10
    assert "table4" not in kept.results
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1


def test_the_command(
    persona: Persona, tiny_dir: Callable[..., Path], made: Reproduction, tmp_path: Path
) -> None:
    (tmp_path / "long.yaml").write_text(LONG.to_yaml(), encoding="utf-8")
    outcome = persona(
        *("reproduce", "-m", tiny_dir("llama")),
        *("--grid", "short=grid.yaml", "--grid", "long=long.yaml", "--out", "rep"),
    )
    assert outcome.code == 0, outcome.err
    for text in (
        "Table 1",
        "Table 4",
        "gemma-2-2b-it (another model, other",
        "recovered",
        "bb (control)",
    ):
        assert text in outcome.out
    out = Path("rep")
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["command"] == "reproduce"
    assert manifest["parts"] == list(TABLES)
    assert manifest["complete"] is True
    for name in TABLES:
        written = read_table(out / f"{name}.csv")
        assert_same_table(written, made.table(name), KL32, check_dtype=False)
        part = json.loads((out / name / "run.json").read_text())
        assert part["command"] == {"table3": "markers", "table4": "inject"}.get(name, "substitute")
    assert (out / "report.html").stat().st_size > 10_000
    assert list((out / "figures").glob("figure1*.png"))

    machine = persona(
        *("reproduce", "-m", tiny_dir("llama"), "--only", "table4", "--json"),
        *("--grid", "long=long.yaml", "--out", "again"),
    )
    report = json.loads(machine.out)
    assert list(report["tables"]) == ["table4"]
    assert report["findings"]["table4"]


def test_interrupting_the_command(
    persona: Persona, tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the interruption falls, in the first pass or the second, the tables are the same."""
    for name, grid in (("short", TINY_GRID), ("long", LONG)):
        (tmp_path / f"{name}.yaml").write_text(grid.to_yaml(), encoding="utf-8")
    grids = ("-g", "short=short.yaml", "-g", "long=long.yaml")
    command = ("reproduce", "-m", tiny_dir("llama"), "--only", "table1,table4", *grids, "--out")
    monkeypatch.setattr(
        "persona_nnsight.report.write.write_report", lambda _: None
    )  # takes its time
    seen: list[object] = []
    passes: list[int] = []
    with monkeypatch.context() as watched:
        watched.setattr(
            "persona_nnsight.experiments.execution.run", engine_cut_off(10**9, seen, passes)
        )
        assert persona(*command, "whole").code == 0
    assert len(passes) == 2
    for stop in (1, passes[1], len(seen) - 5):
        out = Path(f"cut{stop}")
        with monkeypatch.context() as stopped:
            stopped.setattr(
                "persona_nnsight.experiments.execution.run", engine_cut_off(stop, [], [])
            )
            outcome = persona(*command, out)
        assert outcome.code == 130, outcome.err
        assert f"`persona resume {out}` goes on" in outcome.err
        assert sorted(path.name for path in out.iterdir()) == ["parts", "pending.json"]
        begun = json.loads((out / "pending.json").read_text())["state"]["limits"]
        assert len(begun) == (1 if stop == 1 else 2)
        assert persona("resume", out).code == 0
        tables = sorted(Path("whole").glob("**/*.csv"))
        assert len(tables) > 6
        for table in tables:
            again = out / table.relative_to("whole")
            assert again.read_bytes() == table.read_bytes(), again


def engine_cut_off(after: int, seen: list[object], passes: list[int]) -> Callable[..., Any]:
    """The engine, interrupted after so many events; `passes` are those before each of its calls."""

    def interrupted(*arguments: Any) -> Any:
        passes.append(len(seen))
        for event in run(*arguments):
            seen.append(event)
            if len(seen) > after:
                raise KeyboardInterrupt
            yield event

    return interrupted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "table9"), "--only 'table9' is nothing of the paper's"),
        (("--grid", "grid.yaml"), "write short=FILE or long=FILE"),
        (("--grid", "short=nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_bad_commands(
    persona: Persona, tiny_dir: Callable[..., Path], arguments: tuple[str, ...], said: str
) -> None:
    outcome = persona("reproduce", "-m", tiny_dir("llama"), *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not Path("outputs").exists()


def test_a_model_of_the_paper_runs_in_its_dtype(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(tiny_dir("llama"))
    command = ("reproduce", "-m", directory, "--only", "table1", "--dry-run")
    assert "float32 on cpu" in persona(*command).out
    known = paper_model

    def named(model: str) -> str | None:
        return "Qwen/Qwen2.5-1.5B-Instruct" if model == directory else known(model)

    monkeypatch.setattr("persona_nnsight.reproduction.published.paper_model", named)
    outcome = persona(*command)
    assert "bfloat16 on cpu" in outcome.out
    assert "in bfloat16, as published" in outcome.err
    assert "rounded" in outcome.out
    assert "float32 on cpu" in persona(*command, "--dtype", "float32").out
