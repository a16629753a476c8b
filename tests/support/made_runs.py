"""Runs of every command with made-up numbers, as directories to report on."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from persona_nnsight.analysis.columns import read_table
from persona_nnsight.analysis.kl_tables import contrasts, kl_summary
from persona_nnsight.analysis.marker_tables import (
    Text,
    marker_contrasts,
    marker_summary,
    marker_table,
)
from persona_nnsight.prompts.grids import Grid

SCRIPT = "<script>document.title = 'ran'</script>"

LAYERS = (8, 16, 26)
POSITIONS = ("p_last", "g1")
CONDITIONS = ("additive", "remove_x", "remove_y", "bb", "by", "xb", "other_x", "random", "clean")
SIZES = {"bb": 3.0, "by": 1.4, "xb": 2.0, "random": 2.5, "other_x": 1.7, "clean": 1e-6}


def a_grid(personas: int = 4, tasks: int = 3) -> Grid:
    names = ["buffett", "marx", "yoda", "angelou", "engineer", "counselor", "founder", "chef"]
    jobs = ["policy", "haiku", "recommend", "review-architecture", "review-launch", "review-tool"]
    return Grid.from_dict(
        {
            "name": "made-up",
            "personas": {
                name: {
                    "text": f"Persona {name} {SCRIPT}",
                    "markers": ["simmer", "mise en place", "place", f"as {name}"],
                }
                for name in names[:personas]
            },
            "tasks": {name: f"Do the task {name}." for name in jobs[:tasks]},
        }
    )


def chance(*what: object) -> float:
    """A number in 0..1 that only the arguments decide."""
    return zlib.crc32(repr(what).encode()) / 2**32


def manifest(command: str, grid: Grid | None, **changed: Any) -> dict[str, Any]:
    cells = [] if grid is None else grid.cells
    return {
        "format": 2,
        "command": command,
        "argv": [command, "--grid", "made up.yaml"],
        "arguments": {"layers": list(LAYERS), "positions": list(POSITIONS), "window": 10},
        "complete": True,
        "finished": "2026-06-01T12:00:00+00:00",
        "model": {
            "id": "org/tiny-<model>",
            "spec": "tiny",
            "revision": "abc123",
            "sha256": "f" * 64,
            "dtype": "float32",
            "device": "cpu",
            "attention": "eager",
            "n_layers": 30,
            "d_model": 576,
            "n_parameters": 134515008,
        },
        "versions": {"python": "3.11.7", "torch": "2.9.0"},
        "grid": None if grid is None else grid.to_dict(),
        "cells": [{"persona": c.persona.key, "task": c.task.key} for c in cells],
        "seconds": {"load": 1.5, "edits": 20.25},
        "peak_memory_bytes": {"host": 2**30},
        **changed,
    }


def write_run(directory: Path, data: Mapping[str, Any], **tables: pd.DataFrame) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps(data), encoding="utf-8")
    for name, table in tables.items():
        table.to_csv(directory / f"{name}.csv", index=False)
    return directory


def kl_rows(grid: Grid, edits: list[dict[str, Any]], size: Callable[..., float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "persona": cell.persona.key,
                "task": cell.task.key,
                **edit,
                "kl": size(edit) * math.exp(2 * chance(cell.persona.key, cell.task.key, edit) - 1),
                "n_tokens": 10,
            }
            for cell in grid.cells
            for edit in edits
        ]
    )


def geometry_rows(grid: Grid, positions: tuple[str, ...] = POSITIONS) -> pd.DataFrame:
    rows = []
    for cell in grid.cells:
        for position in positions:
            for layer in LAYERS:
                luck = chance(cell, position, layer)
                rows.append(
                    {
                        "persona": cell.persona.key,
                        "task": cell.task.key,
                        "position": position,
                        "layer": layer,
                        "cos_xy_sum": 0.95 - 0.005 * layer - 0.1 * luck,
                        "cos_xy_y": 0.9 - 0.005 * layer - 0.15 * luck,
                        "cos_xy_x": 0.4 - 0.005 * layer - 0.1 * luck,
                        "cos_xy_other": 0.85 - 0.005 * layer - 0.1 * luck,
                        "cos_x_y": 0.3 - 0.01 * layer + 0.1 * luck,
                        "inter_over_xy": 0.2 + 0.01 * layer + 0.1 * luck,
                        "rest_y": 0.3 + 0.01 * layer + 0.15 * luck,
                        "rest_x": 0.95 + 0.1 * luck,
                        "rest_other": 0.4 + 0.01 * layer + 0.1 * luck,
                        "norm_dx": 3.0,
                        "inter_over_xy_normed": 0.25 + 0.012 * layer + 0.1 * luck,
                    }
                )
    return pd.DataFrame(rows)


def texts(grid: Grid, edits: list[dict[str, Any]]) -> list[Text]:
    return [
        Text(
            cell.persona.key,
            cell.task.key,
            edit["condition"],
            edit.get("position"),
            edit.get("layers"),
            edit.get("alpha"),
            edit.get("beta"),
            text=f"Let it simmer, then the mise en place <b>&amp; {SCRIPT}\nas {cell.persona.key}."
            if chance(cell, edit) > 0.4
            else "Plain words without any hint, " * 8,
            n_tokens=30,
        )
        for cell in grid.cells
        for edit in edits
    ]


def write_texts(directory: Path, made: list[Text]) -> None:
    lines = [json.dumps({k: v for k, v in vars(text).items() if v is not None}) for text in made]
    (directory / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def substitute(
    directory: Path,
    grid: Grid | None = None,
    layers: tuple[int, ...] = LAYERS,
    conditions: tuple[str, ...] = CONDITIONS,
    **changed: Any,
) -> Path:
    grid = grid or a_grid()
    edits = [
        {"condition": condition, "host": "XY", "position": position, "layers": str(layer)}
        for condition in conditions
        for position in POSITIONS
        for layer in layers
    ]

    def size(edit: dict[str, Any]) -> float:
        base = 0.001 if edit["position"] == "p_last" else 0.0005
        return base * SIZES.get(edit["condition"], 1.0) * math.exp(int(edit["layers"]) / 4)

    kl = kl_rows(grid, edits, size)
    return write_run(
        directory,
        manifest("substitute", grid, **changed),
        kl=kl,
        summary=kl_summary(kl),
        contrasts=contrasts(kl),
        geometry=geometry_rows(grid),
    )


def inject(directory: Path, grid: Grid | None = None) -> Path:
    grid = grid or a_grid()
    sets = ("14", "10+12+14", "10+12+14+16+18")
    edits = [{"condition": "host", "host": "BY", "position": "p_last", "layers": "none"}]
    edits += [
        {"condition": condition, "host": "BY", "position": "p_last", "layers": layers}
        for condition in ("oracle", "cached")
        for layers in sets
    ]
    sizes = {"host": 3.0, "oracle": 2.5, "cached": 2.8}
    kl = kl_rows(grid, edits, lambda edit: sizes[edit["condition"]])
    host = kl[kl["condition"] == "host"].set_index(["persona", "task"])["kl"].rename("of")
    kl["gap_closed"] = 1 - kl["kl"] / kl.join(host, on=["persona", "task"])["of"]
    return write_run(
        directory,
        manifest("inject", grid),
        kl=kl,
        summary=kl_summary(kl),
        contrasts=contrasts(kl),
    )


def markers(directory: Path, grid: Grid | None = None) -> Path:
    grid = grid or a_grid()
    made = texts(
        grid,
        [
            {"condition": "clean"},
            {"condition": "additive", "position": "p_last", "layers": "14"},
            {"condition": "remove_x", "position": "p_last", "layers": "14"},
            {"condition": "bare"},
        ],
    )
    table = marker_table(grid, made)
    write_run(
        directory,
        manifest("markers", grid),
        summary=marker_summary(table),
        contrasts=marker_contrasts(table),
        markers=table,
    )
    write_texts(directory, made)
    return directory


def steer(directory: Path, host: str = "XY", betas: tuple[float, ...] = (0.5, 1.0)) -> Path:
    grid = a_grid(2, 3)
    site = {"host": host, "position": "p_last", "layers": "16"}
    control = {"condition": "host", **site, "layers": "none"}
    if host == "XY":
        control = {"condition": "bb", **site}
    edits: list[dict[str, Any]] = [{**control, "alpha": None, "beta": None}]
    edits += [
        {"condition": "steer", **site, "alpha": alpha / 2, "beta": beta}
        for beta in betas
        for alpha in range(5)
    ]

    def size(edit: dict[str, Any]) -> float:
        if edit["alpha"] is None:
            return 2.0
        alpha, beta = float(edit["alpha"]), float(edit["beta"])
        return 0.05 + 0.6 * (alpha - 1) ** 2 + (beta - 1) ** 2

    kl = kl_rows(grid, edits, size)
    if host == "BY":
        of = kl[kl["condition"] == "host"].set_index(["persona", "task"])["kl"].rename("of")
        kl["gap_closed"] = 1 - kl["kl"] / kl.join(of, on=["persona", "task"])["of"]
    made = texts(grid, edits)
    write_run(
        directory,
        manifest("steer", grid),
        kl=kl,
        summary=kl_summary(kl),
        contrasts=contrasts(kl),
        markers=marker_table(grid, made),
    )
    write_texts(directory, made)
    return directory


def capture(directory: Path) -> Path:
    grid = a_grid()
    return write_run(directory, manifest("capture", grid), geometry=geometry_rows(grid))


def reproduce(directory: Path, same_model: bool = False) -> Path:
    substitute(directory / "table1", conditions=("additive", "bb", "by"))
    substitute(directory / "table2", a_grid(2, 3), LAYERS[:2], ("additive", "bb", "by"))
    markers(directory / "table3")
    inject(directory / "table4")
    theirs = "org/tiny-<model>" if same_model else "google/gemma-2-2b-it"
    tables = {}
    for part in ("table1", "table2", "table4"):
        ours = read_table(directory / part / "summary.csv")
        names = {"median": "value", "median_lo": "lo", "median_hi": "hi"}
        table = ours.rename(columns=names).assign(persona="", task="", measure="kl")
        one = table.iloc[:1]
        table = pd.concat(
            [
                table,
                one.assign(condition="", measure="cos_xy_sum", value=0.9),
                one.assign(persona="yoda", value=0.11),
                one.assign(task="haiku", value=0.22),
            ]
        )
        has_theirs = ~table["condition"].isin(["bb", "by"])
        table["published"] = pd.Series(0.371, table.index).where(has_theirs)
        tables[part] = table.assign(
            published_model=theirs,
            published_layers="14",
            published_q25=0.2,
            published_q75=0.5,
            same_stimuli=False,
            difference=table["value"] - table["published"] if same_model else None,
        )
    ours = read_table(directory / "table3" / "summary.csv")
    tables["table3"] = pd.DataFrame(
        [
            {
                "position": "p_last",
                "layers": row["layers"],
                "condition": row["condition"],
                "measure": measure,
                "value": row[measure],
                "lo": row[f"{measure}_lo"],
                "hi": row[f"{measure}_hi"],
                "n": row["n"],
                "published_model": theirs,
                "published_layers": "14",
                "published": {"any": 16, "distinct": 1.21}[measure],
                "difference": None,
            }
            for measure in ("any", "distinct")
            for _, row in ours.iterrows()
        ]
    )
    data = manifest("reproduce", None, parts=["table1", "table2", "table3", "table4"])
    return write_run(directory, data, **tables)


#: Command: how to make a run of it.
MAKERS: dict[str, Callable[[Path], Path]] = {
    "substitute": substitute,
    "inject": inject,
    "markers": markers,
    "steer": steer,
    "capture": capture,
    "reproduce": reproduce,
}

#: Command: the files of its figures.
FIGURES = {
    "substitute": {
        *("kl-by-layer", "sites", "cells", "by-persona", "by-task", "cosines", "interaction"),
    },
    "inject": {"injection"},
    "markers": {"markers"},
    "steer": {"steering"},
    "capture": {"cosines", "interaction"},
    "reproduce": {
        *("figure1", "figure1-controls", "table1-sites", "table1-cells", "table1-by-persona"),
        *("table1-by-task", "table1-cosines", "table1-interaction", "table2-sites", "table2-cells"),
        *("table2-by-persona", "table2-by-task", "table2-cosines", "table2-interaction"),
        *("table3-markers", "table4-injection"),
    },
}
