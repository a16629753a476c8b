"""What a parser or reader makes of any input: a value that keeps its promises, or PersonaError.

Every check takes one input, and fails by an AssertionError or by whatever else the code raises.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from persona_cli.options import BackendOptions

from persona_nnsight.backends.ndif.ledger import STATES, Ledger
from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.steer import parse_factors
from persona_nnsight.experiments.substitute import _conditions
from persona_nnsight.method.conditions import SUBSTITUTE_CONDITIONS
from persona_nnsight.method.marker_words import distinct_markers, find_markers, folded
from persona_nnsight.method.sites import (
    POSITIONS,
    format_layers,
    format_positions,
    parse_layer_sets,
    parse_layers,
    parse_positions,
)
from persona_nnsight.models.loading import _device
from persona_nnsight.models.weights.resolve import resolve
from persona_nnsight.pages.stored_run import Run
from persona_nnsight.prompts.grid_import import grid_from_script
from persona_nnsight.prompts.grids import Grid, is_key
from persona_nnsight.prompts.strict_yaml import parse_yaml
from persona_nnsight.report.reading import COMMANDS, read_run
from persona_nnsight.reproduction.protocol import TABLES, parse_targets
from persona_nnsight.storage.vectors import Vectors

_GRID = Grid.from_dict({"name": "g", "personas": {"a": "A", "b": "B"}, "tasks": {"t": "T"}})


@contextmanager
def refused() -> Iterator[None]:
    """Let a PersonaError of one line pass, and nothing else."""
    said = "nothing, which is fine"
    try:
        yield
    except PersonaError as refusal:
        said = str(refusal)
    assert len(said.splitlines()) == 1, said


def check_layers(text: str, n_layers: int) -> None:
    with refused():
        found = parse_layers(text, n_layers)
        _assert_layers(found, n_layers)
        assert parse_layers(format_layers(found).replace("+", ","), n_layers) == found


def check_layer_sets(text: str, n_layers: int) -> None:
    with refused():
        found = parse_layer_sets(text, n_layers)
        assert found
        assert len(set(found)) == len(found)
        for chosen in found:
            _assert_layers(chosen, n_layers)
        written = "; ".join(format_layers(chosen).replace("+", ",") for chosen in found)
        assert parse_layer_sets(written, n_layers) == found


def _assert_layers(found: Sequence[int], n_layers: int) -> None:
    assert found
    assert all(type(layer) is int and 0 <= layer < n_layers for layer in found)
    assert list(found) == sorted(set(found))


def check_positions(text: str) -> None:
    with refused():
        found = parse_positions(text)
        assert found
        assert found == tuple(name for name in POSITIONS if name in found)
        assert parse_positions(format_positions(found).replace("+", ",")) == found


def check_conditions(text: str) -> None:
    with refused():
        found = _conditions(text, _GRID, rounds=False)
        assert found
        assert found == [name for name in SUBSTITUTE_CONDITIONS if name in found]


def check_targets(text: str) -> None:
    with refused():
        found = parse_targets(text)
        assert found
        assert found == tuple(table for table in TABLES if table in found)


def check_factors(text: str) -> None:
    with refused():
        found = parse_factors(text, "--alpha")
        assert found
        assert all(type(factor) is float and math.isfinite(factor) for factor in found)
        assert len(set(found)) == len(found)
        assert len(found) <= 200 * (text.count(",") + 1)
        assert parse_factors(",".join(map(repr, found)), "--alpha") == found


def check_budget(text: str) -> None:
    with refused():
        found = BackendOptions(memory_budget=text).memory_bytes()
        assert type(found) is int
        assert found > 0


def check_device(text: str) -> None:
    with refused():
        assert _device(text) in {"cpu", "mps", "balanced"} | {f"cuda:{n}" for n in range(64)}


def check_model_spec(text: str) -> None:
    with refused():
        assert resolve(text, fetch=False, weights=False).model_id


def check_markers(text: str, markers: Sequence[str]) -> None:
    found = find_markers(text, markers)
    for marker, start, end in found:
        assert marker in markers
        assert 0 <= start < end <= len(text)
        assert folded(marker) in folded(text[start:end])
    spans = [(start, end) for _, start, end in found]
    assert spans == sorted(spans)
    present = {marker for marker, _, _ in found}
    assert distinct_markers(text, markers) == [m for m in markers if m in present]


def check_grid(raw: bytes) -> None:
    with refused():
        assert_grid(Grid.from_dict(parse_yaml(raw)))


def check_script(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory, refused():
        path = Path(directory, "script.py")
        path.write_bytes(raw)
        assert_grid(grid_from_script(path))


def assert_grid(grid: Grid) -> None:
    assert Grid.from_dict(grid.to_dict()) == grid
    assert Grid.from_dict(parse_yaml(grid.to_yaml().encode())) == grid
    assert len(grid.cells) == len(grid.personas) * len(grid.tasks) > 0
    for cell in grid.cells[:4]:
        assert is_key(cell.persona.key)
        assert is_key(cell.task.key)
        assert all(marker == folded(marker) != "" for marker in cell.persona.markers)
        prompt = grid.prompt(cell.persona, cell.task)
        assert cell.persona.text in prompt
        assert cell.task.text in prompt


def check_run(files: Mapping[str, bytes]) -> None:
    """A run directory of these files."""
    with tempfile.TemporaryDirectory() as directory:
        for name, raw in files.items():
            Path(directory, name).write_bytes(raw)
        with refused():
            _assert_run(read_run(Path(directory)))


def _assert_run(run: Run) -> None:
    assert run.command in COMMANDS
    assert isinstance(run.complete, bool)
    if run.grid is not None:
        assert_grid(run.grid)
    for name in ("model", "versions", "arguments", "seconds"):
        assert isinstance(run.facts(name), Mapping)
    for table in run.tables.values():
        # A row with a value too many would have made the first column an index.
        assert list(table.index) == list(range(len(table)))
        for name in {"persona", "task", "condition", "position", "layers"} & set(table.columns):
            assert all(isinstance(value, str) for value in table[name])
        for name in {"kl", "n_tokens", "median", "n", "cos_xy_sum"} & set(table.columns):
            assert table[name].dtype.kind in "iuf"
    for text in run.texts:
        assert all(isinstance(text[name], str) for name in ("persona", "task", "text"))


def check_vectors(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory, refused():
        path = Path(directory, "v.safetensors")
        path.write_bytes(raw)
        found = Vectors.load(path)
        shape = (len(found.positions), len(found.layers), found.d_model)
        for tensor in (found.base, *found.delta_x.values(), *found.delta_y.values()):
            assert tuple(tensor.shape) == shape
            assert torch.isfinite(tensor).all()
        again = Vectors.load(found.save(Path(directory, "again.safetensors")))
        assert (again.personas, again.tasks) == (found.personas, found.tasks)
        assert (again.layers, again.positions) == (found.layers, found.positions)
        assert torch.equal(again.base, found.base)


def check_ledger(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory, refused():
        Path(directory, "pending.json").write_bytes(raw)
        found = Ledger.load(Path(directory))
        assert isinstance(found.host, str)
        assert all(job.state in STATES for job in found.jobs.values())
