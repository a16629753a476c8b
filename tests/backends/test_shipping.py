"""What travels to a server: source text and plain data, in parts that add up to the whole."""

from __future__ import annotations

import ast
import importlib
import json
import linecache
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import zstandard
from cells import MARKED, TINY_GRID
from nnsight.intervention.serialization import CustomCloudUnpickler, loads
from rounding import KL32
from tiny import Tiny

from persona_nnsight import Grid, Model, PersonaError, capture
from persona_nnsight.backends.wire import importing, job
from persona_nnsight.backends.wire import sources as shipping
from persona_nnsight.backends.wire.session import Envelope, run_block
from persona_nnsight.backends.wire.sources import shipped_name, shipped_sources
from persona_nnsight.engine.run import run
from persona_nnsight.experiments.capture import Capture
from persona_nnsight.experiments.inject import Inject
from persona_nnsight.experiments.markers import Markers
from persona_nnsight.experiments.steer import Steer
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.data import from_data, to_data
from persona_nnsight.plan.events import Recorded, Scored, Written
from persona_nnsight.plan.joining import part_of
from persona_nnsight.plan.packing import pack, unpack
from persona_nnsight.plan.plan import Plan

MODULES = (job.__name__, run.__module__)


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return shipped_sources(MODULES)


# ------------------------------------------------------------------------------------- sources


def imports(tree: ast.AST, *, in_functions: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether inside a function) of every import that is not for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name, in_functions) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import would not be renamed"
            yield str(node.module), in_functions
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, in_functions=in_functions or inside)


def test_the_shipped_modules_import_what_a_server_has(sources: dict[str, str]) -> None:
    package = next(iter(sources))
    checked = 0
    for name, text in sources.items():
        for module, in_function in imports(ast.parse(text)):
            root = module.split(".")[0]
            checked += 1
            if root == package:
                assert module in sources, f"{name} imports {module}, which is not shipped"
                continue
            if root in ("psutil", "jinja2"):
                assert in_function, f"{name} imports {root}, which a server need not have"
                continue
            assert root in {"torch", "nnsight", "transformers"} | sys.stdlib_module_names, name
    assert checked > 50


def test_the_shipped_modules_are_plain(sources: dict[str, str]) -> None:
    package = next(iter(sources))
    names = {name.removeprefix(package).lstrip(".") for name in sources}
    assert {
        "",
        "backends",
        "backends.wire.job",
        "engine.run",
        "engine.whole.score",
        "plan.plan",
    } <= names
    # Of the rooms below the engine, what it needs; of those above it, nothing.
    assert {name for name in names if name.startswith(("prompts.", "models."))} == {
        "prompts.prompt",
        "prompts.rendering",
        "models.module_tree",
        "models.paths",
    }
    assert not names & {"plan.building", "plan.joining", "backends.ndif"}
    above = ("persona_cli", "storage", "analysis", "report", "experiments", "reproduction")
    assert not [name for name in names if name.startswith(above)]
    assert sources[package] == ""
    assert sum(map(len, sources.values())) < 200_000


def test_the_package_has_a_name_of_its_own(sources: dict[str, str]) -> None:
    package = next(iter(sources))
    assert package.startswith("_persona_nnsight_")
    assert package.isidentifier()
    assert all(name == package or name.startswith(f"{package}.") for name in sources)
    for text in sources.values():
        for module, _ in imports(ast.parse(text)):
            assert module.split(".")[0] != "persona_nnsight"
    assert shipped_name("persona_nnsight.engine.run", sources) == f"{package}.engine.run"
    assert shipped_name("persona_nnsight.engine.run", sources) in sources


def test_other_text_has_another_name(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped_sources.cache_clear()
    assert shipped_sources(MODULES) == sources
    read = shipping._source
    names = {next(iter(sources))}
    for changed in ("persona_nnsight.engine.run", "persona_nnsight.plan.plan"):
        shipped_sources.cache_clear()
        monkeypatch.setattr(
            shipping, "_source", lambda name, c=changed: read(name) + "\n" * (name == c)
        )
        names.add(next(iter(shipped_sources(MODULES))))
    shipped_sources.cache_clear()
    assert len(names) == 3


def test_the_bootstrap_imports_the_standard_library_alone() -> None:
    with open(str(importing.__file__), encoding="utf-8") as file:
        found = {module.split(".")[0] for module, _ in imports(ast.parse(file.read()))}
    assert found <= sys.stdlib_module_names


# ------------------------------------------------------------------------------------- payload


class Recording(CustomCloudUnpickler):  # type: ignore[misc]
    """Notes every class and function that a payload names, and what pickling itself rebuilds."""

    named: set[tuple[str, str]] = set()
    rebuilt: list[tuple[str, Any]] = []

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        self.named.add((module, name))
        if not module.startswith("cloudpickle"):
            return found

        def rebuild(*arguments: Any, **others: Any) -> Any:
            self.rebuilt.append((name, arguments))
            return found(*arguments, **others)

        return rebuild


def test_the_payload_holds_no_code(tiny: Tiny) -> None:
    model = tiny("llama")
    envelope = Envelope()
    plan = Substitute(layers=(2,), positions="p_last", generate=2).plan(model, TINY_GRID)
    assert run_block(model, run, plan, None, envelope) is None
    assert len(envelope.blob) < 100_000
    payload = zstandard.ZstdDecompressor().decompress(envelope.blob)
    Recording.named, Recording.rebuilt = set(), []
    persistent = model.lm._remoteable_persistent_objects()
    _, (source, glbls, variables) = loads(payload, persistent, Recording)
    roots = {module.split(".")[0] for module, _ in Recording.named}
    assert "nnsight" in roots, "nothing was looked up, so nothing was tested"
    assert roots <= {"nnsight", "torch", "typing", "builtins", "collections", "cloudpickle"}
    assert not {name for _, name in Recording.named} & {"CodeType", "FunctionType", "eval", "exec"}
    # nnsight's stand-in for a frame, and the module that the block names.
    assert set(Recording.rebuilt) <= {
        ("_builtin_type", ("SimpleNamespace",)),
        ("subimport", ("nnsight",)),
    }

    assert isinstance(source, str)
    ast.parse(source)
    everything = {**glbls, **variables}
    plain = {name: value for name, value in everything.items() if is_data(value)}
    assert plain.keys() >= {"sources", "entry", "request", "bootstrap"}
    assert everything.keys() - plain.keys() - {"__builtins__"} <= {"lm", "nnsight", "Any"}
    assert set(plain["request"]) == {"function", "plan", "dtype", "attention"}
    assert from_data(json.loads(plain["request"]["plan"])) == plan


def is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(is_data, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(is_data, value))
    return value is None or isinstance(value, str | int | float | bool)


# --------------------------------------------------------------------------------- the far side

FAR = {
    "_far": "",
    "_far.helper": "def double(x):\n    return 2 * x\n",
    "_far.main": (
        "from _far.helper import double\n\n\n"
        "def work(lm, x):\n    if x is None:\n        raise ValueError('far trouble')\n"
        "    return {'lm': lm, 'x': double(x)}\n"
    ),
    "_far.broken": "import nothing_of_this_name\n",
}


def state() -> tuple[set[str], list[Any]]:
    return set(sys.modules), list(sys.meta_path)


def test_there_leaves_no_trace() -> None:
    before = state()
    assert importing.run("a model", FAR, "_far.main:work", {"x": 4}) == {"lm": "a model", "x": 8}
    assert state() == before


@pytest.mark.parametrize(
    ("entry", "error", "words"),
    [
        ("_far.main:work", ValueError, "far trouble"),
        ("_far.main:absent", AttributeError, "absent"),
        ("_far.broken:work", ImportError, "nothing_of_this_name"),
        ("_far.absent:work", ImportError, "absent"),
    ],
)
def test_there_leaves_no_trace_of_a_failure(entry: str, error: type[Exception], words: str) -> None:
    before = state()
    with pytest.raises(error, match=words):
        importing.run(None, FAR, entry, {"x": None})
    assert state() == before


def test_a_failing_job_leaves_no_trace(tiny: Tiny, sources: dict[str, str]) -> None:
    model = tiny("llama")
    plan = Capture(layers=(2,), positions="p_last").plan(model, MARKED)
    request = {
        "function": f"{shipped_name(run.__module__, sources)}:{run.__name__}",
        "plan": json.dumps(to_data(plan)),
        "dtype": "float64",
        "attention": "sdpa",
    }
    entry = f"{shipped_name(job.__name__, sources)}:run_job"
    before = state()
    with pytest.raises(Exception, match="asks for float64"):
        importing.run(model.lm, sources, entry, request)
    assert state() == before


def test_tracebacks_show_the_far_source() -> None:
    with pytest.raises(ValueError, match="far trouble") as failed:
        importing.run(None, FAR, "_far.main:work", {"x": None})
    frame = failed.traceback[-1]
    assert str(frame.path).endswith("<_far.main>") or "<_far.main>" in str(frame)
    line = linecache.getline("<_far.main>", frame.lineno + 1)
    assert "raise ValueError('far trouble')" in line


def test_two_versions_live_side_by_side() -> None:
    old = {"_far_1": "", "_far_1.main": "def work(lm):\n    return 1\n"}
    new = {"_far_2": "", "_far_2.main": "def work(lm):\n    return 2\n"}

    class Nested:
        """A model whose use runs another job."""

        def result(self) -> Any:
            return importing.run(None, new, "_far_2.main:work", {})

    old["_far_1.main"] = "def work(lm):\n    return (lm.result(), __name__)\n"
    before = state()
    found: Any = importing.run(Nested(), old, "_far_1.main:work", {})
    assert found == (2, "_far_1.main")
    assert state() == before


def test_an_installed_package_of_the_same_name_is_not_touched() -> None:
    import persona_nnsight

    importing.run(None, FAR, "_far.main:work", {"x": 1})
    assert sys.modules["persona_nnsight"] is persona_nnsight
    assert importlib.import_module("persona_nnsight.plan.plan").Plan is Plan


# --------------------------------------------------------------------------------- plans in parts


def given_plan(model: Model) -> Plan:
    """Effects that were captured on other tasks, for some of the personas."""
    vectors = capture(model, TINY_GRID, layers=(2, 3), positions="p_last").vectors()
    data: dict[str, Any] = TINY_GRID.to_dict()
    data["tasks"] = {"poem": "write a poem.", "joke": "tell a joke."}
    return Steer(layers=(2, 3), alpha="0,2", vectors=vectors, generate=2).plan(
        model, Grid.from_dict(data)
    )


def plan_on_some_cells(model: Model) -> Plan:
    plan = Substitute(layers=(2, 4), positions="p_user_last,g1", conditions="by,random").plan(
        model, TINY_GRID
    )
    sets: list[tuple[int, ...] | None] = [(0,), (1, 3, 5), None, (), (4, 5), (2, 0)]
    edits = tuple(replace(e, cells=sets[n % len(sets)]) for n, e in enumerate(plan.edits))
    return replace(plan, edits=edits)


PLANS: dict[str, Callable[[Model], Plan]] = {
    "substitute": lambda model: Substitute(layers=(2, 4), positions="p_last,g2", generate=3).plan(
        model, TINY_GRID
    ),
    "capture": lambda model: Capture(
        layers=(0, 3), positions="p_user_last,p_last,g1", window=1
    ).plan(model, TINY_GRID),
    "inject": lambda model: Inject(layers="2; 3,4").plan(model, MARKED),
    "markers": lambda model: Markers(layers="2,3", tokens=5).plan(model, MARKED),
    "given": given_plan,
    "some cells": plan_on_some_cells,
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_survive_as_json(tiny: Tiny, name: str) -> None:
    plan = PLANS[name](tiny("llama"))
    data = to_data(plan)
    assert is_data(data)
    assert from_data(data) == plan
    again = from_data(json.loads(json.dumps(data)))
    assert again == plan
    assert hash(again.edits) == hash(plan.edits)
    assert json.dumps(to_data(again), sort_keys=True) == json.dumps(data, sort_keys=True)


@pytest.mark.parametrize("name", PLANS)
def test_a_part_has_what_it_needs_and_no_more(tiny: Tiny, name: str) -> None:
    plan = PLANS[name](tiny("llama"))
    part = part_of(plan, range(1, 3))
    assert [(cell.persona, cell.task) for cell in part.cells] == [
        (cell.persona, cell.task) for cell in plan.cells[1:3]
    ]
    used = {index for cell in part.cells for index in cell.prompts.values()}
    assert used == set(range(len(part.prompts)))
    for cell, was in zip(part.cells, plan.cells[1:3], strict=True):
        texts = {key: part.prompts[index].text for key, index in cell.prompts.items()}
        assert texts == {key: plan.prompts[index].text for key, index in was.prompts.items()}
        assert cell.seed == was.seed
    assert len(part.edits) == len(plan.edits)
    for edit, before in zip(part.edits, plan.edits, strict=True):
        assert [edit.runs_on(cell) for cell in (0, 1)] == [before.runs_on(c) for c in (1, 2)]
    assert (part.given_x is None) == (plan.given_x is None)
    if part.given_x is not None:
        assert set(part.given_x) == {cell.persona for cell in part.cells}
    assert part_of(plan, range(len(plan.cells))) == from_data(to_data(plan))


def results_of(model: Model, plan: Plan, ranges: list[range], limits: Limits) -> dict[Any, Any]:
    """What the parts leave, travelled through JSON and packing, by cell and edit."""
    found: dict[Any, Any] = {}
    for cells in ranges:
        part = from_data(json.loads(json.dumps(to_data(part_of(plan, cells)))))
        packed = pack(run(model.lm, model.tree, part, limits))
        for event in unpack(*packed, cells.start):
            match event:
                case Recorded():
                    for row, cell in enumerate(event.cells):
                        assert ("continuation", cell) not in found
                        found["continuation", cell] = event.continuations[row]
                        found["margins", cell] = list(event.margins[row])
                        for key, value in event.geometry.items():
                            found["geometry", cell, key] = value[row].flatten().tolist()
                        for key, value in (event.residuals or {}).items():
                            found["residual", cell, key] = value[row].flatten().tolist()
                case Scored():
                    assert ("kl", event.cell, event.edit) not in found
                    found["kl", event.cell, event.edit] = [event.kl, event.n_tokens]
                case Written():
                    assert ("text", event.cell, event.edit) not in found
                    found["text", event.cell, event.edit] = event.tokens
    return found


@pytest.mark.parametrize("name", PLANS)
def test_the_parts_add_up(tiny: Tiny, name: str) -> None:
    model = tiny("llama")
    plan = PLANS[name](model)
    n = len(plan.cells)
    one_by_one = Limits(cells=1, rows=100)  # with the same batches the numbers are the same
    whole = results_of(model, plan, [range(n)], one_by_one)
    assert len([key for key in whole if key[0] == "continuation"]) == n
    assert_same(results_of(model, plan, [range(c, c + 1) for c in range(n)], one_by_one), whole, 0)
    uneven = [range(n - 1, n), range(n - 1)]
    assert_same(results_of(model, plan, uneven, Limits(cells=100, rows=100)), whole, KL32)


def assert_same(parts: dict[Any, Any], whole: dict[Any, Any], close: float) -> None:
    assert parts.keys() == whole.keys()
    for key, value in whole.items():
        if key[0] in ("continuation", "text"):
            assert parts[key] == value, key
        else:
            assert parts[key] == pytest.approx(value, rel=0, abs=close, nan_ok=True), key


def test_attention_is_the_clients_for_a_job_and_then_as_before(tiny: Tiny) -> None:
    model = tiny("llama")
    config = model.lm._module.config
    assert config._attn_implementation == "sdpa"
    plan = Capture(layers=(2,), positions="p_last").plan(model, MARKED)
    function = f"{run.__module__}:{run.__name__}"
    answer = job.run_job(model.lm, function, json.dumps(to_data(plan)), None, "eager")
    assert answer["facts"]["attention"] == "eager"
    assert config._attn_implementation == "sdpa"


def test_attention_that_cannot_be_changed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sandbox: eager is insisted on, since a model may need it, and others are taken."""
    plan = Capture(layers=(2,), positions="p_last").plan(tiny("llama"), MARKED)
    arguments = (f"{run.__module__}:{run.__name__}", json.dumps(to_data(plan)), None)
    monkeypatch.setattr(job, "is_far", lambda lm: True)
    with pytest.raises(PersonaError, match="use --attn sdpa to take them"):
        job.run_job(tiny("llama").lm, *arguments, "eager")
    answer = job.run_job(tiny("llama").lm, *arguments, "flash_attention_2")
    assert answer["facts"]["attention"] == "sdpa"
