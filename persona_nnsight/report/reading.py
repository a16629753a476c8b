"""Run directories as the report needs them: read once, checked, whatever is optional left out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import CELL, COLUMN, COLUMNS, is_text, read_table
from persona_nnsight.errors import PersonaError, first_line, quoted
from persona_nnsight.experiments.registry import NAMES, experiment_named
from persona_nnsight.method.sites import NO_LAYERS, POSITIONS
from persona_nnsight.pages.stored_run import Run
from persona_nnsight.prompts.grids import Grid
from persona_nnsight.storage.manifest import FORMAT
from persona_nnsight.storage.run_directory import PENDING, RUN

if TYPE_CHECKING:
    import pandas as pd

COMMANDS = (*NAMES, "reproduce")
#: The parts of a reproduction, in the paper's order.
PARTS = ("table1", "table2", "table3", "table4")

#: Mappings in ``run.json``; an older run lacks some.
_OBJECTS = ("model", "backend", "versions", "arguments", "seconds", "grid", "peak_memory_bytes")

#: What a row is about: together they are there once.
_KEYS = tuple(column.name for column in COLUMNS if column.is_key)
_PUBLISHED_COLUMNS = ("condition", "value", "n", "published_model", "published")

#: Columns that hold names of ours or keys of a grid. Tables are files, and anybody may have
#: written them: a name is letters, digits and a few signs, before it is drawn or told of.
_NAMES = tuple(column.name for column in COLUMNS if column.is_name)
_NAME = re.compile(r"[A-Za-z0-9_.+-]*")

_ADVICE = "a report needs the table as the run wrote it"


def read_run(directory: Path) -> Run:
    """Read and check a run directory.

    Raises:
        PersonaError: it is none, or a file in it is missing, damaged or edited out of shape.
    """
    manifest = _read_manifest(directory)
    command = manifest["command"]
    tables: dict[str, pd.DataFrame] = {}
    if command == "reproduce":
        for part in PARTS:
            _read_into(tables, directory, part, _PUBLISHED_COLUMNS)
        parts = {
            part: read_run(directory / part)
            for part in PARTS
            if (directory / part / "run.json").exists()
        }
        if not parts and not tables:
            raise PersonaError(
                f"The reproduction {str(directory)!r} holds none of {', '.join(PARTS)}; "
                "run 'persona reproduce' again."
            )
        return Run(directory.absolute().name, manifest, None, tables, [], parts)
    # An interrupted run may have finished nothing, and then it has no tables.
    whole = manifest.get("complete", True) is not False
    for name, file in experiment_named(command).files.items():
        _read_into(tables, directory, name, file.columns, needed=whole and file.needed)
    try:
        grid = Grid.from_dict(manifest["grid"]) if manifest.get("grid") else None
    except PersonaError as problem:
        raise _damaged(directory, f"its grid is damaged: {problem}") from None
    for name, table in tables.items():
        _check_rows(directory / f"{name}.csv", table, grid)
    return Run(directory.absolute().name, manifest, grid, tables, _read_texts(directory))


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / RUN
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if (directory / PENDING).exists():
            raise PersonaError(
                f"The run in {str(directory)!r} is not finished; `persona resume {directory}` goes "
                "on with it."
            ) from None
        raise PersonaError(
            f"{str(directory)!r} is no run directory: it has no run.json; give the directory that "
            "a command such as 'persona substitute' wrote."
        ) from None
    except OSError as error:
        raise PersonaError(f"{str(path)!r} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError):
        raise _damaged(directory, "it is not valid JSON") from None
    if not isinstance(manifest, dict):
        raise _damaged(directory, "it holds no JSON object")
    command = manifest.get("command")
    if command not in COMMANDS:
        raise _damaged(directory, f"its command is {command!r}, not one of {', '.join(COMMANDS)}")
    version = manifest.get("format", FORMAT)
    if type(version) is not int or version > FORMAT:
        raise PersonaError(
            f"{str(path)!r} is in format {version!r}, and this version reads formats up to "
            f"{FORMAT}; update persona-nnsight, or run the command again."
        )
    for name in _OBJECTS:
        if not isinstance(manifest.get(name, {}), dict | None):
            raise _damaged(directory, f"its {name!r} is no JSON object")
    for name in ("cells", "argv"):
        if not isinstance(manifest.get(name, []), list | None):
            raise _damaged(directory, f"its {name!r} is no list")
    return manifest


def _damaged(directory: Path, why: str) -> PersonaError:
    return PersonaError(
        f"{str(directory / 'run.json')!r} is damaged: {why}; run the command again, or take the "
        "file from a backup."
    )


def _read_into(
    tables: dict[str, pd.DataFrame],
    directory: Path,
    name: str,
    columns: Sequence[str],
    needed: bool = False,
) -> None:
    """Read a csv under its name, if it is there or `needed`."""
    path = directory / f"{name}.csv"
    if needed or path.exists():
        tables[name] = _read_csv(path, columns)
        if needed and tables[name].empty:
            raise PersonaError(f"{str(path)!r} has no rows; {_ADVICE}, so run the command again.")


def _read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    try:
        table = read_table(path)
    except FileNotFoundError:
        raise PersonaError(
            f"{str(path)!r} is missing; {_ADVICE}, so run the command again."
        ) from None
    except (ValueError, OSError) as error:  # pandas' own parser errors are ValueErrors
        why = getattr(error, "strerror", None) or first_line(error)
        raise PersonaError(f"{str(path)!r} cannot be read ({why}); {_ADVICE}.") from None
    for name in columns:
        if name not in table:
            raise PersonaError(f"{str(path)!r} has no column {name!r}; {_ADVICE}.")
    if not isinstance(table.index, pd.RangeIndex):  # pandas' way to take one value too many
        raise PersonaError(
            f"{str(path)!r} has rows with more values than its first line has names; {_ADVICE}."
        )
    for name in table.columns:
        if is_text(name):
            # pandas takes layers like 14 for numbers where read_table does not know the column.
            table[name] = [_word(value) for value in table[name]]
            for row, value in enumerate(table[name], start=2):
                if name in _NAMES and not _NAME.fullmatch(value):
                    raise PersonaError(
                        f"{str(path)!r} has {value[:60]!r} in row {row}, column {name!r}, where a "
                        f"name belongs; {_ADVICE}."
                    )
        elif name in columns or (name in COLUMN and COLUMN[name].type != "bool"):
            numbers = pd.to_numeric(table[name], errors="coerce")
            for row, (value, number) in enumerate(zip(table[name], numbers, strict=True), start=2):
                if pd.isna(number) and not pd.isna(value):
                    raise PersonaError(
                        f"{str(path)!r} has {str(value)!r} in row {row}, column {name!r}, where a "
                        f"number belongs; {_ADVICE}."
                    )
            if not pd.api.types.is_numeric_dtype(table[name]):
                table[name] = numbers.astype(float)  # a column without any value
    return table


def _check_rows(path: Path, table: pd.DataFrame, grid: Grid | None) -> None:
    """Refuse rows about what the run does not have, and rows that are there twice."""
    known = {"position": {*POSITIONS, NO_LAYERS, ""}}  # the latter two where nothing is written
    if grid is not None:
        known |= {"persona": set(grid.persona_keys), "task": set(grid.task_keys)}
    for name, names in known.items():
        for row, words in enumerate(table.get(name, ()), start=2):
            for word in words.split("+") if name == "position" else [words]:
                if word not in names:
                    raise PersonaError(
                        f"{str(path)!r} has the {name} {quoted(word)} in row {row}, which the run "
                        f"does not have; {_ADVICE}."
                    )
    repeated = table.duplicated([name for name in _KEYS if name in table])
    if repeated.any():
        row = int(repeated.to_numpy().argmax()) + 2
        raise PersonaError(f"{str(path)!r} repeats an earlier row in row {row}; {_ADVICE}.")


def _word(value: object) -> str:
    if value is None or value != value:  # NaN
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read_texts(directory: Path) -> list[Mapping[str, Any]]:
    path = directory / "text.jsonl"
    texts: list[Mapping[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return texts
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise PersonaError(f"{str(path)!r} cannot be read ({why}).") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)
            known = all(isinstance(text[name], str) for name in (*CELL, "condition", "text"))
            known = known and all(_NAME.fullmatch(str(text.get(name) or "")) for name in _NAMES)
            known &= isinstance(text.get("position"), str | None)
            known &= isinstance(text.get("layers"), str | int | None)
        except (ValueError, RecursionError, KeyError, TypeError):
            known = False
        if not known:
            raise PersonaError(
                f"Line {number} of {str(path)!r} is no JSON object with persona, task, condition "
                "and text; a report needs the file as the run wrote it."
            )
        texts.append(text)
    return texts
