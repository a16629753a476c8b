"""Saved vectors: the file, what is refused, and the control vectors that come out of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from gguf import GGUFReader, GGUFWriter
from persona_cli.commands import vectors as command
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from persona_nnsight import Grid, PersonaError
from persona_nnsight.storage.control_vectors import write_control_vector
from persona_nnsight.storage.vectors import Vectors

SHA = "0123456789abcdef" * 4
LAYERS = (0, 1, 2, 5, 7)
POSITIONS = ("p_user_last", "p_last")
D = 6
PERSONAS = {"yoda": "Yoda", "Bob_2.x-y": "Bob [bold]the :boat: builder[/bold]"}
TASKS = {"haiku": "Write a haiku – now."}
SHAPE = (len(POSITIONS), len(LAYERS), D)


def random(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vectors() -> Vectors:
    return Vectors(
        model_id="org/tiny",
        model_sha256=SHA,
        architecture="llama",
        n_layers=8,
        d_model=D,
        template="As {persona}, {task}",
        baseline_persona="a thoughtful person",
        baseline_task="Give advice.",
        positions=POSITIONS,
        layers=LAYERS,
        personas=dict(PERSONAS),
        tasks=dict(TASKS),
        base=random(0),
        delta_x={key: random(seed) for seed, key in enumerate(PERSONAS, 1)},
        delta_y={key: random(seed) for seed, key in enumerate(TASKS, 9)},
    )


@pytest.fixture
def grid() -> Grid:
    return Grid.from_dict(
        {
            "name": "mine",
            "baseline": {"persona": "a thoughtful person", "task": "Give advice."},
            "personas": {**PERSONAS, "chef": "a chef"},
            "tasks": {"plan": "Plan a trip."},
        }
    ).select(list(PERSONAS))


# The file


def test_round_trip(vectors: Vectors, tmp_path: Path) -> None:
    path = vectors.save(tmp_path / "new" / "v.safetensors")
    assert path == tmp_path / "new" / "v.safetensors"
    again = Vectors.load(str(path))
    for name in vectors.__dataclass_fields__:
        if name not in ("base", "delta_x", "delta_y"):
            assert getattr(again, name) == getattr(vectors, name), name
    assert torch.equal(again.base, vectors.base)
    for name in ("delta_x", "delta_y"):
        effects, expected = getattr(again, name), getattr(vectors, name)
        assert effects.keys() == expected.keys()
        assert all(torch.equal(effects[key], expected[key]) for key in expected)
    assert os.listdir(path.parent) == ["v.safetensors"]


def test_layout(vectors: Vectors, tmp_path: Path) -> None:
    path = replace(vectors, model_sha256=None).save(tmp_path / "v.safetensors")
    with safe_open(path, framework="np") as file:
        assert sorted(file.keys()) == [
            "delta_x.Bob_2.x-y",
            "delta_x.yoda",
            "delta_y.haiku",
            "h_BB",
        ]
        assert np.array_equal(file.get_tensor("delta_x.yoda"), vectors.delta_x["yoda"].numpy())
        assert list(file.metadata()) == ["persona_nnsight"]
        labels = json.loads(file.metadata()["persona_nnsight"])
    assert labels["format"] == 1
    assert labels["model_sha256"] is None
    assert labels["layers"] == list(LAYERS)
    assert labels["personas"] == PERSONAS


def test_views_of_captured_residuals_are_saved(vectors: Vectors, tmp_path: Path) -> None:
    """Slices share storage and transposes are not contiguous; safetensors alone refuses both."""
    captured = torch.stack([random(20), random(21)], dim=-1)
    whole = replace(vectors, delta_x={"yoda": captured[..., 0], "Bob_2.x-y": captured[..., 1]})
    loaded = Vectors.load(whole.save(tmp_path / "v.safetensors"))
    assert torch.equal(loaded.delta_x["Bob_2.x-y"], random(21))


def test_an_existing_file_is_kept(vectors: Vectors, tmp_path: Path) -> None:
    (tmp_path / "v").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name in ("v", "dangling"):
        with pytest.raises(PersonaError, match="exists already and is not overwritten"):
            vectors.save(tmp_path / name)
        with pytest.raises(PersonaError, match="exists already and is not overwritten"):
            write_control_vector(vectors, "yoda", tmp_path / name)
    assert (tmp_path / "v").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "v"]


def test_an_unwritable_place(vectors: Vectors, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PersonaError, match="is no directory that you may write to"):
        vectors.save(tmp_path / "file" / "v.safetensors")


def test_nothing_remains_of_a_failed_write(
    vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        assert any(tmp_path.iterdir())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(PersonaError, match="No space left on device"):
        vectors.save(tmp_path / "v.safetensors")
    assert os.listdir(tmp_path) == []

    written: list[str] = []

    def interrupted(self: GGUFWriter, *args: object, **kwargs: object) -> None:
        written.extend(path.name for path in tmp_path.rglob("*.gguf"))
        raise KeyboardInterrupt

    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_control_vector(vectors, "yoda", tmp_path / "v.gguf")
    assert written == ["v.gguf"]
    assert os.listdir(tmp_path) == []


def write(path: Path, labels: object, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"persona_nnsight": json.dumps(labels)})


Damage = Callable[[dict[str, Any], dict[str, Tensor]], object]


def put(name: str, value: object) -> Damage:
    return lambda labels, tensors: labels.update({name: value})


def tensor(name: str, value: Tensor) -> Damage:
    return lambda labels, tensors: tensors.update({name: value})


def spoilt(value: float) -> Tensor:
    values = random(3)
    values[1, 2, 3] = value
    return values


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (put("format", 2), "in format 2, and this version reads format 1; update"),
        (lambda labels, _: labels.pop("format"), "in format None"),
        (lambda labels, _: labels.pop("layers"), "'layers' is missing"),
        (put("model_id", ""), "model_id is ''"),
        (put("model_id", "\x1b[31mred"), "model_id is"),
        (put("model_sha256", 7), "model_sha256 is 7"),
        (put("architecture", None), "architecture is None"),
        (put("n_layers", True), "n_layers is True"),
        (put("d_model", 0), "d_model is 0"),
        (put("d_model", D + 1), r"shape \[2, 5, 6\], but the labels say \[2, 5, 7\]"),
        (put("positions", ["p_last", "g1"]), r"positions are \['p_last', 'g1'\]"),
        (put("positions", ["p_last", "p_user_last"]), "in this order"),
        (put("positions", []), r"positions are \[\]"),
        (put("positions", 3), "positions are 3"),
        (put("positions", ["p_last"]), r"shape \[2, 5, 6\], but the labels say \[1, 5, 6\]"),
        (put("layers", [0, 1, 2, 5, 8]), "whole numbers from 0 to 7"),
        (put("layers", [0, 2, 1, 5, 7]), "ascending"),
        (put("layers", [0, 1, 1, 5, 7]), "without repeats"),
        (put("layers", [0, 1, 2, 5.0, 7]), "whole numbers"),
        (put("layers", "01257"), "layers are 01257"),
        (put("layers", []), r"layers are \[\]"),
        (put("template", "As {persona}"), "'template' is"),
        (put("baseline_task", ""), "'baseline.task' is empty"),
        (put("personas", ["yoda"]), "'personas' must be a mapping"),
        (put("personas", {"../x": "Yoda"}), "cannot be|has the key '../x'"),
        (put("personas", {**PERSONAS, "yoda": {"text": "Yoda"}}), "'yoda' is {'text': 'Yoda'}"),
        (put("personas", {**PERSONAS, "yoda": " Yoda"}), "white space around it"),
        (put("personas", {**PERSONAS, "yoda": "\x1b[2J"}), r"U\+001B"),
        (
            put("personas", {**PERSONAS, "chef": "a chef"}),
            "'delta_x.chef' has a text but no tensor",
        ),
        (put("tasks", {"ode": "Ode"}), "'delta_y.haiku' has a tensor but no text"),
        (lambda _, tensors: tensors.pop("h_BB"), "'h_BB' is missing"),
        (lambda _, tensors: tensors.pop("delta_x.yoda"), "'delta_x.yoda' has a text but no tensor"),
        (tensor("h_XB", random(3)), "'h_XB' is none of h_BB"),
        (tensor("delta_y.haiku", random(3)[0].clone()), r"'delta_y.haiku' has the shape \[5, 6\]"),
        (tensor("delta_x.yoda", random(3).bfloat16()), "'delta_x.yoda' is bfloat16"),
        (tensor("h_BB", random(3).double()), "'h_BB' is float64"),
        (tensor("h_BB", spoilt(float("nan"))), "'h_BB' holds a value that is not finite"),
        (tensor("delta_x.yoda", spoilt(float("inf"))), "'delta_x.yoda' holds a value that is not"),
    ],
)
def test_damaged_files(vectors: Vectors, tmp_path: Path, damage: Damage, says: str) -> None:
    whole = vectors.save(tmp_path / "whole.safetensors")
    with safe_open(whole, framework="pt") as file:
        labels = json.loads(file.metadata()["persona_nnsight"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    write(tmp_path / "control.safetensors", labels, tensors)
    Vectors.load(tmp_path / "control.safetensors")
    damage(labels, tensors)
    write(tmp_path / "damaged.safetensors", labels, tensors)
    with pytest.raises(PersonaError, match=says) as caught:
        Vectors.load(tmp_path / "damaged.safetensors")
    assert str(caught.value).startswith(f"{tmp_path / 'damaged.safetensors'}: ")


def test_files_that_are_no_vectors(vectors: Vectors, tmp_path: Path) -> None:
    whole = vectors.save(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-7])
    (tmp_path / "header").write_bytes(whole[:30])
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("not safetensors at all")
    (tmp_path / "directory").mkdir()
    save_file({"h_BB": random(0)}, tmp_path / "residuals", metadata={"cells": "[]"})
    save_file({"h_BB": random(0)}, tmp_path / "bare")
    for name, text in (("nojson", "{"), ("list", "[1]"), ("deep", "[" * 100_000)):
        save_file({"h_BB": random(0)}, tmp_path / name, metadata={"persona_nnsight": text})
    for name, says in (
        ("gone", "does not exist"),
        ("directory", "is a directory"),
        ("cut", "cannot be read as a safetensors file"),
        ("header", "cannot be read as a safetensors file"),
        ("empty", "cannot be read as a safetensors file"),
        ("text", "cannot be read as a safetensors file"),
        ("residuals", "has no metadata 'persona_nnsight'"),
        ("bare", "has no metadata 'persona_nnsight'"),
        ("nojson", "is not a JSON object"),
        ("list", "is not a JSON object"),
        ("deep", "is not a JSON object"),
    ):
        with pytest.raises(PersonaError, match=says) as caught:
            Vectors.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bad_vectors_cannot_be_built(vectors: Vectors) -> None:
    """The checks are those of the class, so what is saved can be loaded."""
    with pytest.raises(PersonaError, match="'h_BB' is bfloat16"):
        replace(vectors, base=vectors.base.bfloat16())
    with pytest.raises(PersonaError, match="layers are"):
        replace(vectors, layers=(0, 1, 2, 5, 8))


# Use in a run


def check(vectors: Vectors, grid: Grid, **other: Any) -> None:
    asked: dict[str, Any] = {
        "model_id": "org/tiny",
        "model_sha256": SHA,
        "n_layers": 8,
        "d_model": D,
        "grid": grid,
        "layers": (2, 7),
        "positions": ("p_last",),
    }
    vectors.check(**{**asked, **other})


def test_fitting_vectors(vectors: Vectors, grid: Grid) -> None:
    check(vectors, grid)
    check(vectors, grid, model_id="same-weights.gguf")  # the hash decides
    check(vectors, grid, model_sha256=None)  # one hash is unknown: the id decides
    check(replace(vectors, model_sha256=None), grid)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"model_sha256": "f" * 64}, r"of other weights .*012345.*ffffff"),
        ({"model_sha256": None, "model_id": "org/b"}, "of the model 'org/tiny', not of 'org/b'"),
        ({"n_layers": 9}, "8 layers and d_model 6, but 'org/tiny' has 9 layers and d_model 6"),
        ({"d_model": 7}, "has 8 layers and d_model 7"),
        ({"layers": (2, 3)}, r"no layer 3; choose among theirs \(0, 1, 2, 5, 7\)"),
        (
            {"positions": ("p_last", "g1")},
            r"no position 'g1'; choose among theirs \(p_user_last, p_last\)",
        ),
    ],
)
def test_vectors_of_something_else(
    vectors: Vectors, grid: Grid, other: dict[str, Any], says: str
) -> None:
    with pytest.raises(PersonaError, match=says):
        check(vectors, grid, **other)


@pytest.mark.parametrize(
    ("measured", "runs", "says"),
    [
        ("2024-07-26", "2024-07-27", "on prompts dated 2024-07-26, and .* are dated 2024-07-27"),
        ("2024-07-26", None, "on prompts dated 2024-07-26, and .* are without a date"),
        (None, "2024-07-26", "on prompts without a date, and .* are dated 2024-07-26"),
    ],
)
def test_vectors_of_another_day(
    vectors: Vectors, grid: Grid, measured: str | None, runs: str | None, says: str
) -> None:
    dated = replace(vectors, date=measured)
    check(dated, grid, date=measured)
    with pytest.raises(PersonaError, match=says):
        check(dated, grid, date=runs)


@pytest.mark.parametrize("day", ["26 Jul 2024", "2024-7-26", "", 20240726])
def test_a_date_that_is_none(vectors: Vectors, day: Any) -> None:
    with pytest.raises(PersonaError, match=r"date is .*YYYY-MM-DD"):
        replace(vectors, date=day)


def test_the_date_is_kept(vectors: Vectors, tmp_path: Path) -> None:
    path = replace(vectors, date="2024-07-26").save(tmp_path / "v.safetensors")
    assert Vectors.load(path).date == "2024-07-26"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"template": "{persona}: {task}"}, "the template 'As .*', but the grid 'mine' has '{pers"),
        ({"baseline_persona": "nobody"}, "baseline persona 'a thoughtful person'"),
        ({"baseline_task": "Rest."}, "baseline task 'Give advice.'"),
        (
            {"persona_keys": ("yoda", "chef")},
            r"no persona 'chef'; choose among theirs \(yoda, Bob_2.x-y\)",
        ),
    ],
)
def test_vectors_of_another_grid(
    vectors: Vectors, grid: Grid, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(PersonaError, match=says):
        check(vectors, replace(grid, **change))


def test_only_selected_personas_matter(vectors: Vectors, grid: Grid) -> None:
    """The grid's chef is not in the file, and another text for one that runs is refused."""
    other = Grid.from_dict({**grid.to_dict(), "personas": {"yoda": "Master Yoda", "chef": "a"}})
    with pytest.raises(PersonaError, match="'yoda' is 'Yoda' in the vectors, but 'Master Yoda'"):
        check(vectors, other.select(["yoda"]))


def test_given_x(vectors: Vectors) -> None:
    given = vectors.given_x(["yoda"], ["p_last"], [5, 2])
    assert list(given) == ["yoda"]
    effect = vectors.delta_x["yoda"]
    assert torch.equal(torch.tensor(given["yoda"]), effect[1:, [3, 2]])
    assert isinstance(given["yoda"], tuple)
    assert type(given["yoda"][0][0][0]) is float
    hash(given["yoda"])
    for asked, says in (
        ((["chef"], ["p_last"], [2]), "persona 'chef'"),
        ((["yoda"], ["g1"], [2]), "position 'g1'"),
        ((["yoda"], ["p_last"], [3]), "layer 3"),
    ):
        with pytest.raises(PersonaError, match=says):
            vectors.given_x(*asked)


# Control vectors


def field(reader: GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    assert found is not None, name
    return found.contents()


@pytest.mark.parametrize(("position", "row"), [("p_user_last", 0), ("p_last", 1)])
def test_control_vector(vectors: Vectors, tmp_path: Path, position: str, row: int) -> None:
    path = write_control_vector(vectors, "yoda", tmp_path / "a" / "yoda.gguf", position)
    assert os.listdir(path.parent) == ["yoda.gguf"]
    reader = GGUFReader(path)
    # Layers 0 and 1 are left out: llama.cpp refuses a file with direction.0.
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.4", "direction.6"]
    for found, layer in zip(reader.tensors, (2, 3, 4), strict=True):
        expected = vectors.delta_x["yoda"][row, layer].numpy()
        assert found.tensor_type.name == "F32"
        assert list(found.shape) == [D]
        assert np.array_equal(found.data, expected)
    assert LAYERS[3] == 5  # so Δ_X at layer 5 sits in direction.4
    assert field(reader, "general.architecture") == "controlvector"
    assert field(reader, "controlvector.model_hint") == "llama"
    count = reader.get_field("controlvector.layer_count")
    assert count is not None
    assert count.contents() == 3
    assert [kind.name for kind in count.types] == ["UINT32"]


def test_control_vector_of_views(vectors: Vectors, tmp_path: Path) -> None:
    captured = torch.stack([random(20), random(21)], dim=-1)
    views = replace(vectors, delta_x={"yoda": captured[..., 0], "Bob_2.x-y": captured[..., 1]})
    reader = GGUFReader(write_control_vector(views, "yoda", tmp_path / "v.gguf"))
    assert np.array_equal(reader.tensors[0].data, random(20)[1, 2].numpy())


def test_control_vectors_that_cannot_be(vectors: Vectors, tmp_path: Path) -> None:
    early = replace(
        vectors,
        layers=(0, 1),
        base=vectors.base[:, :2],
        delta_x={key: value[:, :2] for key, value in vectors.delta_x.items()},
        delta_y={key: value[:, :2] for key, value in vectors.delta_y.items()},
    )
    for wrong, persona, position, says in (
        (early, "yoda", "p_last", "layers 0, 1 only, and a control vector starts at layer 2"),
        (vectors, "chef", "p_last", "no persona 'chef'"),
        (vectors, "yoda", "g1", "no position 'g1'"),
    ):
        with pytest.raises(PersonaError, match=says):
            write_control_vector(wrong, persona, tmp_path / "v.gguf", position)
    assert os.listdir(tmp_path) == []


# The command


class Outcome:
    def __init__(self, out: str, error: BaseException | None) -> None:
        self.out, self.error = out, error


@pytest.fixture
def persona_vectors(vectors: Vectors, tmp_path: Path) -> Callable[..., Outcome]:
    app = typer.Typer()
    app.command()(command.vectors)
    path = str(vectors.save(tmp_path / "v.safetensors"))

    def call(*arguments: str) -> Outcome:
        result = CliRunner().invoke(app, [path, *arguments])
        error = None if isinstance(result.exception, SystemExit) else result.exception
        assert error is not None or result.exit_code == 0, result.output
        return Outcome(result.output, error)

    return call


def test_show(vectors: Vectors, persona_vectors: Callable[..., Outcome]) -> None:
    out = persona_vectors().out
    for text in (
        "org/tiny (llama, 8 layers, d_model 6, sha256 0123456789ab…)",
        "As {persona}, {task}",
        "a thoughtful person",
        "Give advice.",
        "p_user_last, p_last",
        "0, 1, 2, 5, 7",
        PERSONAS["Bob_2.x-y"],
        "‖Δ_X‖ at p_last",
    ):
        assert text in out
    # More layers than personas: a row for each layer, personas and then h_BB in the columns.
    columns = [vectors.delta_x["yoda"], vectors.delta_x["Bob_2.x-y"], vectors.base]
    rows = [line.split() for line in out.splitlines()]
    for i, layer in enumerate(LAYERS):
        assert [str(layer), *(f"{x[1, i].norm():.3f}" for x in columns)] in rows
    assert "Bob" not in persona_vectors("--personas", "yoda").out


def test_show_at_another_position_with_layers_in_columns(vectors: Vectors, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command.vectors)
    row = replace(
        vectors,
        positions=("p_user_last",),
        layers=(5,),
        base=vectors.base[:1, 3:4],
        delta_x={key: value[:1, 3:4] for key, value in vectors.delta_x.items()},
        delta_y={key: value[:1, 3:4] for key, value in vectors.delta_y.items()},
    )
    path = row.save(tmp_path / "row.safetensors")
    out = CliRunner().invoke(app, [str(path)]).output
    assert "‖Δ_X‖ at p_user_last" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["persona", "layer", "5"] in rows
    for key in PERSONAS:
        assert [key, f"{vectors.delta_x[key][0, 3].norm():.3f}"] in rows


def test_export(vectors: Vectors, persona_vectors: Callable[..., Outcome], tmp_path: Path) -> None:
    directory = tmp_path / "control"
    out = persona_vectors("--gguf", str(directory)).out
    assert sorted(os.listdir(directory)) == ["Bob_2.x-y.gguf", "yoda.gguf"]
    assert f"wrote {directory / 'yoda.gguf'}: Δ_X of yoda at p_last\n" in out
    assert "layers: 2, 5, 7\n" in out
    assert "left out: layers 0, 1" in out
    assert f"--control-vector-scaled {directory / 'yoda.gguf'}:1.0" in out
    # The advised range must name a direction that the file has.
    assert "--control-vector-layer-range 4 4 adds Δ_X of layer 5" in out
    reader = GGUFReader(directory / "Bob_2.x-y.gguf")
    assert np.array_equal(reader.tensors[1].data, vectors.delta_x["Bob_2.x-y"][1, 3].numpy())


def test_export_of_some(
    vectors: Vectors, persona_vectors: Callable[..., Outcome], tmp_path: Path
) -> None:
    directory = tmp_path / "control"
    persona_vectors("--gguf", str(directory), "--personas", " yoda", "-p", "p_user_last")
    assert os.listdir(directory) == ["yoda.gguf"]
    reader = GGUFReader(directory / "yoda.gguf")
    assert np.array_equal(reader.tensors[0].data, vectors.delta_x["yoda"][0, 2].numpy())
    # One file that exists stops the whole export, also of those before it.
    (directory / "yoda.gguf").rename(directory / "Bob_2.x-y.gguf")
    error = persona_vectors("--gguf", str(directory)).error
    assert isinstance(error, PersonaError)
    assert "Bob_2.x-y.gguf' exists already" in str(error)
    assert os.listdir(directory) == ["Bob_2.x-y.gguf"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--personas", "yoda,chef"], "--personas names 'chef'"),
        (["--personas", ""], "--personas names ''"),
        (["--position", "g1"], "--position is 'g1'"),
    ],
)
def test_wrong_options(
    persona_vectors: Callable[..., Outcome], arguments: list[str], says: str
) -> None:
    error = persona_vectors(*arguments).error
    assert isinstance(error, PersonaError)
    assert says in str(error)
