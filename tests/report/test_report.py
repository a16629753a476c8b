"""Reports: every command's sections, the csv's numbers, and the page in a real browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Mapping
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
import typer
from persona_cli.commands import report as cli_report
from typer.testing import CliRunner

from persona_nnsight import PersonaError
from persona_nnsight.analysis.columns import read_table
from persona_nnsight.analysis.kl_tables import contrasts, kl_summary
from persona_nnsight.analysis.marker_tables import (
    Text,
    marker_contrasts,
    marker_summary,
    marker_table,
)
from persona_nnsight.prompts.grids import Grid
from persona_nnsight.report import numbers
from persona_nnsight.report import write as writing
from persona_nnsight.report.figures import canvas
from persona_nnsight.report.figures.canvas import inline_svg
from persona_nnsight.report.figures.lines import EQUALS, Line, line_panel
from persona_nnsight.report.figures.substitute import cell_dots
from persona_nnsight.report.generations import highlight
from persona_nnsight.report.write import write_report

SCRIPT = "<script>document.title = 'ran'</script>"
FINDING = "At p_last the additive vector is < its controls & so on."

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
                        "cos_x_y": 0.3 - 0.01 * layer + 0.1 * luck,
                        "inter_over_xy": 0.2 + 0.01 * layer + 0.1 * luck,
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

#: Command: the headings of its sections.
HEADINGS = {
    "substitute": ("What changes when one residual is overwritten?", "In numbers"),
    "inject": ("Can the persona be written into a prompt that does not name it?", "In numbers"),
    "markers": ("Does the text still show the persona?", "In numbers", "Generated texts"),
    "steer": ("What do other strengths of the two effects do?", "In numbers", "Generated texts"),
    "capture": ("Do the effects add up in the residual stream?",),
    "reproduce": ("Figure 1", "Beside the published numbers"),
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every command."""
    root = tmp_path_factory.mktemp("runs")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def pages(runs: dict[str, Path]) -> dict[str, str]:
    """The page about each of them, written into its directory."""
    return {name: write_report([run]).read_text("utf-8") for name, run in runs.items()}


def rows_of(page: str) -> list[tuple[list[str], list[float]]]:
    """Every table row of a page: its words, and the exact values of its numbers."""
    return [
        (
            [unescape(text) for text in re.findall(r"<t[hd][^>]*>([^<]+)</t[hd]>", row)],
            [float(value) for value in re.findall(r'<data value="([^"]+)">', row)],
        )
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]


def has_row(page: str, words: list[str], values: list[float]) -> bool:
    return any(
        all(word in found for word in words)
        and all(any(math.isclose(value, one, rel_tol=1e-12) for one in ours) for value in values)
        for found, ours in rows_of(page)
    )


def everything(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# What is on a page


@pytest.mark.parametrize("command", MAKERS)
def test_every_command_has_its_sections(
    command: str, pages: dict[str, str], runs: dict[str, Path]
) -> None:
    page = pages[command]
    for heading in (*HEADINGS[command], "Where the numbers come from"):
        assert re.search(rf"<h[2-4][^>]*>{re.escape(heading)}</h[2-4]>", page), heading
    written = {path.name for path in (runs[command] / "figures").iterdir()}
    assert written == {f"{stem}.{kind}" for stem in FIGURES[command] for kind in ("png", "svg")}
    assert set(re.findall(r'data-file="([^"]+)"', page)) == FIGURES[command]


@pytest.mark.parametrize("command", MAKERS)
def test_a_page_is_well_made(command: str, pages: dict[str, str]) -> None:
    page = pages[command]
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:url\(|href=")#([^)"]+)', page):
        assert used in ids
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert '<html lang="en">' in page
    assert page.count("<svg") == page.count('role="img"')
    assert "nan" not in re.sub(r"<[^>]+>", " ", page).lower().split()
    # No colour is left that does not follow the reader's colour scheme.
    assert not re.search(r"(?:fill|stroke): #", page)


def test_tables_hold_the_numbers_of_the_csv(pages: dict[str, str], runs: dict[str, Path]) -> None:
    for command in ("substitute", "inject", "steer"):
        for row in read_table(runs[command] / "summary.csv").to_dict("records"):
            words = [row["position"], row["layers"], row["condition"]]
            words += [numbers.plain(row[name]) for name in ("alpha", "beta") if name in row]
            values = [row["median"], row["n"]]
            values += [
                row[name]
                for name in ("recovered", "gap_closed")
                if name in row and not math.isnan(row[name])
            ]
            assert has_row(pages[command], words, values), row
        for row in read_table(runs[command] / "contrasts.csv").to_dict("records"):
            words = [row["position"], row["layers"], row["condition"], row["control"]]
            assert has_row(pages[command], words, [row["difference"], row["lower"]]), row
    for row in read_table(runs["markers"] / "summary.csv").to_dict("records"):
        values = [row["any"], row["distinct"], row["n"]]
        assert has_row(pages["markers"], [row["condition"], row["layers"]], values), row
    assert not has_row(pages["substitute"], ["p_last", "additive"], [123.456])


def test_intervals_are_written_out(pages: dict[str, str], runs: dict[str, Path]) -> None:
    row = read_table(runs["inject"] / "summary.csv").iloc[0]
    low, high = f"{row['median_lo']:.4f}", f"{row['median_hi']:.4f}"
    assert f'<td class="n">{low} to {high}</td>' in pages["inject"]


def test_every_label_is_there(pages: dict[str, str]) -> None:
    page = pages["substitute"]
    for label in (*CONDITIONS, *POSITIONS, *(f'<th scope="row">{layer}<' for layer in LAYERS)):
        assert label in page
    for persona, task in (("buffett", "policy"), ("angelou", "recommend")):
        assert f">{persona}</text>" in page
        assert f">{task}</text>" in page


def test_provenance_is_there(pages: dict[str, str]) -> None:
    for fact in (
        *("f" * 64, "abc123", "float32", "eager", "134,515,008 parameters", "host 1.00 GiB"),
        *("persona substitute --grid &#39;made up.yaml&#39;", "torch 2.9.0", "edits 20.25"),
    ):
        assert fact in pages["substitute"], fact


def test_what_users_wrote_is_text(pages: dict[str, str]) -> None:
    for command in ("markers", "steer", "reproduce"):
        assert "<script" not in pages[command]
        assert "&lt;script&gt;document.title" in pages[command]
    assert "org/tiny-&lt;model&gt;" in pages["substitute"]


def test_markers_are_highlighted(pages: dict[str, str]) -> None:
    page = pages["markers"]
    assert "Let it <mark>simmer</mark>, then the <mark>mise en place</mark> &lt;b&gt;" in page
    assert "<mark>as yoda</mark>" in page
    assert "<mark>as yoda</mark>" not in page.split("<b>angelou</b>")[1]


def test_overlapping_markers_share_a_mark() -> None:
    assert highlight("Some well-known thing", ["well-known", "known thing"]) == (
        "Some <mark>well-known thing</mark>"
    )
    assert highlight("a<b<c", ["b"]) == "a&lt;<mark>b</mark>&lt;c"
    assert highlight("nothing", []) == "nothing"


def test_findings_are_shown_as_text(
    tmp_path: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def findings(command: str, tables: Mapping[str, pd.DataFrame]) -> list[str]:
        asked[command] = set(tables)
        return [FINDING]

    monkeypatch.setattr("persona_nnsight.analysis.findings.findings", findings)
    page = write_report([runs["inject"], runs["capture"]], tmp_path).read_text("utf-8")
    assert page.count("<li>At p_last the additive vector is &lt; its controls &amp; so on.") == 2
    assert asked == {"inject": {"summary", "contrasts"}, "capture": {"geometry"}}


def test_an_interrupted_run_says_so_loudly(tmp_path: Path) -> None:
    run = inject(tmp_path / "half")
    data = json.loads((run / "run.json").read_text())
    assert 'role="alert"' not in write_report([run]).read_text("utf-8")
    (run / "run.json").write_text(json.dumps({**data, "complete": False}))
    kl = pd.read_csv(run / "kl.csv")
    kl[kl["persona"] == "yoda"].to_csv(run / "kl.csv", index=False)
    page = write_report([run]).read_text("utf-8")
    assert 'role="alert"' in page
    assert "rows of 3 of 12 cells" in page


@pytest.mark.parametrize("command", ["substitute", "inject", "markers", "steer", "capture"])
def test_a_run_interrupted_before_its_first_cell(command: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "none", manifest(command, a_grid(), complete=False))
    page = write_report([run]).read_text("utf-8")
    assert "rows of 0 of 12 cells" in page
    assert "<svg" not in page


def test_older_and_smaller_runs_show_what_they_have(tmp_path: Path) -> None:
    grid = a_grid(1, 1)
    kl = kl_rows(
        grid,
        [{"condition": name, "position": "p_last", "layers": "8"} for name in ("additive", "xb")],
        lambda edit: 0.1,
    )
    summary = kl[["condition", "position", "layers"]].assign(n=1)
    for name in ("median", "q25", "q75", "min", "max"):
        summary[name] = kl["kl"]
    data = manifest("substitute", grid)
    for name in ("versions", "seconds", "peak_memory_bytes", "arguments", "cells", "argv"):
        del data[name]
    run = write_run(tmp_path / "old", data, kl=kl, summary=summary)
    page = write_report([run]).read_text("utf-8")
    assert "Without controls" in page
    assert has_row(page, ["p_last", "8", "xb"], [kl["kl"][1], 1])
    for absent in ("recovered", "95 % interval</th>", "Do the effects add up", "by persona"):
        assert absent not in page


def test_values_that_are_not_finite_are_dashes(tmp_path: Path) -> None:
    run = inject(tmp_path / "run")
    for name in ("kl", "summary"):
        table = pd.read_csv(run / f"{name}.csv")
        table.loc[0, "kl" if name == "kl" else "median"] = float("inf")
        table.loc[1, "gap_closed"] = float("nan")
        table.to_csv(run / f"{name}.csv", index=False)
    assert '<data value="inf">∞</data>' in write_report([run]).read_text("utf-8")


def test_sites_are_limited_where_there_are_many() -> None:
    grid = a_grid(2, 3)
    edits = [
        {"condition": c, "host": "XY", "position": p, "layers": str(layer)}
        for c in ("additive", "bb")
        for p in ("p_user_last", "p_last", "g1", "g2")
        for layer in range(30)
    ]
    kl = kl_rows(grid, edits, lambda edit: 0.1)
    figure = cell_dots(kl_summary(kl), kl)
    assert len(figure.panels) == 12
    assert "12 of 120 sites" in figure.caption
    assert [panel.label.split(".")[0] for panel in figure.panels[:2]] == [
        "p_user_last, layer 0",
        "p_user_last, layer 14",
    ]


def test_a_reproduction_on_another_model_has_no_verdict(pages: dict[str, str]) -> None:
    page = pages["reproduce"]
    assert "the published numbers are of another model, google/gemma-2-2b-it" in page
    assert "ours − published" not in page
    assert has_row(page, ["p_last", "8", "additive", "14"], [0.371])
    beside = page.split("Beside the published numbers")[1].split("<article")[0]
    assert '<th scope="col" class="n">published</th>' not in beside
    assert "other model&#39;s value" in beside
    assert has_row(page, ["clean", "cells with a marker"], [16])
    assert "over cells with other texts" in page
    assert has_row(page, ["p_last", "yoda"], [0.11, 0.371])
    assert has_row(page, ["p_last", "cos(Δ_XY, Δ_X + Δ_Y)"], [0.9, 0.371])
    # The rows that the paper has no number for are left to the part's own sections.
    assert ">bb<" not in beside


def test_a_reproduction_on_the_same_model_has_differences(tmp_path: Path) -> None:
    run = reproduce(tmp_path / "same", same_model=True)
    for part in ("table2", "table3", "table4"):
        shutil.rmtree(run / part)
        (run / f"{part}.csv").unlink()
    page = write_report([run]).read_text("utf-8")
    assert "the published numbers are of the same model" in page
    assert "another model" not in page
    assert "other model" not in page
    row = read_table(run / "table1.csv").iloc[0]
    assert has_row(page, ["p_last", "8", "additive"], [row["value"], row["difference"]])
    assert "Table 2" not in page


# Where it is written


def test_the_same_runs_give_the_same_bytes(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [runs["inject"], runs["capture"]]
    write_report(chosen, tmp_path / "one")
    before = dict(mpl.rcParams)
    # Neither the reader's own settings nor the date go into a figure.
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "red")
    monkeypatch.setitem(mpl.rcParams, "xtick.direction", "in")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    write_report(chosen, tmp_path / "two")
    monkeypatch.undo()
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert dict(mpl.rcParams) == before


def test_a_report_is_replaced_in_place(tmp_path: Path) -> None:
    run = inject(tmp_path / "run")
    first = write_report([run])
    (run / "figures" / "mine.png").write_bytes(b"mine")
    kept = everything(run)
    write_report([run])
    assert everything(run) == kept
    # A figure that the new report does not have goes, what others put there stays.
    capture(run)
    (run / "run.json").write_text(json.dumps(manifest("capture", a_grid())))
    assert write_report([run]) == first
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {
        "mine.png",
        *(f"{stem}.{kind}" for stem in FIGURES["capture"] for kind in ("png", "svg")),
    }


def test_a_page_of_someone_else_keeps_its_figures(tmp_path: Path) -> None:
    run = capture(tmp_path / "run")
    (run / "figures").mkdir()
    (run / "figures" / "old.svg").write_text("theirs")
    (run / "report.html").write_text('<figure data-file="old">')
    write_report([run])
    assert (run / "figures" / "old.svg").read_text() == "theirs"


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = inject(tmp_path / "run")
    write_report([run])
    kept = everything(run)
    calls = []

    def save(*arguments: Any) -> None:
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save", save)
    with pytest.raises(PersonaError, match="No space left on device"):
        write_report([run])
    assert calls
    assert everything(run) == kept
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_several_runs_need_a_place_and_get_a_contents(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PersonaError, match="2 runs"):
        write_report([runs["inject"], runs["capture"]])
    with pytest.raises(PersonaError, match="No run"):
        write_report([])
    # The same run twice is two runs on the page.
    page = write_report([runs["inject"], runs["inject"]], tmp_path / "a" / "b").read_text("utf-8")
    assert re.findall(r'<a href="#([^"]+)">', page) == ["1-run", "2-run"]
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert (tmp_path / "a" / "b" / "figures" / "2-injection.svg").exists()


# What is not a run


def break_json(run: Path) -> None:
    (run / "run.json").write_text("{")


def set_json(**changed: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        data = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**data, **changed}))

    return change


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove("run.json"), r"is no run directory: it has no run\.json"),
        (break_json, r"run\.json' is damaged: it is not valid JSON"),
        (lambda run: (run / "run.json").write_text("[]"), "holds no JSON object"),
        (lambda run: (run / "run.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
        (set_json(command="dance"), "its command is 'dance', not one of capture"),
        (set_json(model="tiny"), "its 'model' is no JSON object"),
        (set_json(cells={}), "its 'cells' is no list"),
        (set_json(grid={"name": "x"}), "its grid is damaged: the grid has no 'personas'"),
        (remove("kl.csv"), r"kl\.csv' is missing"),
        (remove("summary.csv"), r"summary\.csv' is missing"),
        (edit("kl.csv", "n_tokens", "tokens"), r"kl\.csv' has no column 'n_tokens'"),
        (edit("summary.csv", "q25", "q"), r"summary\.csv' has no column 'q25'"),
        (edit("kl.csv", ",10,", ",ten,"), r"kl\.csv' has 'ten' in row 2, column 'n_tokens'"),
        (edit("summary.csv", "condition,", ""), "where a number belongs|has no column"),
        (edit("kl.csv", ",oracle,", ",<img src=x>,"), r"kl\.csv' has '<img src=x>' in row"),
        (edit("summary.csv", "oracle", "{0.__class__}"), r"summary\.csv' has '{0\.__class__}' in"),
        (edit("kl.csv", "10+12+14", "a b"), "column 'layers', where a name belongs"),
        (lambda run: (run / "kl.csv").write_text(""), r"kl\.csv' cannot be read"),
        (lambda run: (run / "kl.csv").write_bytes(b"\xff\xfe,"), r"kl\.csv' cannot be read"),
        (lambda run: (run / "text.jsonl").write_text('{"text": 1}'), r"Line 1 of .*text\.jsonl"),
        (
            lambda run: (run / "text.jsonl").write_text(
                '{"persona": "<b>", "task": "x", "condition": "clean", "text": ""}'
            ),
            r"Line 1 of .*text\.jsonl",
        ),
    ],
)
def test_what_is_no_run_is_said_in_one_sentence(
    damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    run = inject(tmp_path / "run", a_grid(2, 3))
    damage(run)
    with pytest.raises(PersonaError, match=says) as caught:
        write_report([run])
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()
    assert not (run / "figures").exists()


def test_places_that_hold_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("file", "absent"):
        with pytest.raises(PersonaError, match="is no run directory"):
            write_report([tmp_path / name])
    run = capture(tmp_path / "run")
    with pytest.raises(PersonaError, match="cannot be written to"):
        write_report([run], tmp_path / "file")
    empty = write_run(tmp_path / "empty", manifest("reproduce", None))
    with pytest.raises(PersonaError, match="holds none of table1"):
        write_report([empty])


# Drawing


def names_at(svg: str, names: tuple[str, ...]) -> dict[str, float]:
    """How far down the texts of an SVG stand."""
    found = {}
    for attributes, text in re.findall(r"<text ([^>]*)>([^<]*)</text>", svg):
        if text in names:
            place = re.search(r'\by="([-0-9.]+)"', attributes)
            assert place
            found[text] = float(place[1])
    return found


def test_names_of_lines_that_meet_stand_apart() -> None:
    lines = [Line(name, EQUALS[0], [1, 2], [0.5, 0.5]) for name in ("one", "two", "three")]
    panel = line_panel("t", lines, x_label="x", y_label="y", ticks=[(1, "1"), (2, "2")])
    at = sorted(names_at(inline_svg(panel, "u"), ("one", "two", "three")).values())
    assert len(at) == 3
    assert all(below - above > 9 for above, below in pairwise(at))


def test_the_longest_keys_of_a_grid_leave_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "save", lambda *arguments: None)  # the page alone
    grid = a_grid(2, 2).to_dict()
    for name in ("personas", "tasks"):
        grid[name] = {key.ljust(64, "x"): value for key, value in grid[name].items()}
    page = write_report([substitute(tmp_path / "run", Grid.from_dict(grid))]).read_text("utf-8")
    assert f">{'buffett'.ljust(29, 'x')}…</text>" in page
    assert "buffett".ljust(64, "x") in page


def test_labels_of_layers_that_lie_close_are_left_out() -> None:
    layers = (7, 10, 12, 13, 14, 18, 19, 22, 25)
    panel = line_panel(
        "t",
        [Line("line", EQUALS[0], layers, [0.5] * len(layers))],
        x_label="layer",
        y_label="y",
        ticks=[(layer, str(layer)) for layer in layers],
    )
    drawn = re.findall(r"<text [^>]*>(\d+)</text>", inline_svg(panel, "u"))
    assert drawn[0] == "7"
    assert drawn[-1] == "25"
    assert {"13", "19"}.isdisjoint(drawn)
    assert {"10", "12", "22"} <= set(drawn)


def variables(css: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", css))


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(scheme: str, pages: dict[str, str]) -> None:
    light, dark = pages["capture"].split("prefers-color-scheme: dark")
    colours = {name: rgb(value) for name, value in variables(light).items()}
    if scheme == "dark":
        colours |= {name: rgb(value) for name, value in variables(dark).items()}
    page = colours["page"]
    for name in ("ink", "muted", "blue", "orange", "green", "purple"):
        assert contrast(colours[name], page) >= 4.5, name
    assert contrast(colours["ink"], colours["mark"]) >= 4.5
    # The darkest cells of a heat map: half of the colour over the page.
    for name in ("blue", "orange"):
        tint = tuple((a + b) / 2 for a, b in zip(colours[name], page, strict=True))
        assert contrast(colours["ink"], tint) >= 4.5, name


def test_files_are_drawn_in_the_light_colours(pages: dict[str, str]) -> None:
    light = variables(pages["capture"].split("prefers-color-scheme: dark")[0])
    for name in ("ink", "muted", "rule", "page", "blue", "orange", "green", "purple"):
        assert getattr(canvas, name.upper()) == light[name]


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (numbers.kl, 0.12345, "0.1235"),
        (numbers.kl, 3e-7, "3e−07"),
        (numbers.kl, -0.5, "−0.5000"),
        (numbers.kl, 0.0, "0.0000"),
        (numbers.kl, math.nan, "–"),
        (numbers.kl, math.inf, "∞"),
        (numbers.short_kl, 0.0712, ".071"),
        (numbers.short_kl, -2e-5, "≈0"),
        (numbers.short_kl, 0.00042, ".0004"),
        (numbers.short_kl, 1.234, "1.23"),
        (numbers.short_kl, 12.3, "12"),
        (numbers.short_kl, 0.0, "0"),
        (numbers.share, 0.894, "89 %"),
        (numbers.share, -0.001, "0 %"),
        (numbers.share, -1.5, "−150 %"),
        (numbers.share, math.nan, "–"),
        (numbers.plain, -0.5, "−0.5"),
    ],
)
def test_numbers_are_written_like_this(
    write: Callable[[float], str], value: float, text: str
) -> None:
    assert write(value) == text


# The command


def command_line() -> typer.Typer:
    app = typer.Typer()
    app.command()(cli_report.report)
    return app


def test_the_command_prints_where_the_report_is(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(runs["capture"])
    Path("outputs/report-1").mkdir(parents=True)
    result = CliRunner().invoke(command_line(), [run, run])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "outputs/report-2/report.html"
    assert Path("outputs/report-2/report.html").exists()
    result = CliRunner().invoke(command_line(), [run, "--out", "here"])
    assert result.stdout.splitlines() == ["here/report.html", "here/figures"]


def test_the_command_is_quick_to_import() -> None:
    code = (
        "import sys, persona_cli.commands.report\n"
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# In a browser


#: Put first into the page: notes errors, blocks and notes requests, measures what came out.
PROBE = """
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<script>
const seen = {errors: [], requests: []};
addEventListener('error', event => seen.errors.push(String(event.message)), true);
addEventListener('securitypolicyviolation', event => seen.requests.push(event.blockedURI));
addEventListener('load', () => {
  // Headless windows are at least 500 pixels wide, so the page stands in a frame.
  if (parent === window) return;
  document.querySelectorAll('details').forEach(details => details.open = true);
  const body = getComputedStyle(document.body);
  const svgs = [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect());
  Object.assign(seen, {
    title: document.title,
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    scripts: document.scripts.length,
    resources: performance.getEntriesByType('resource').length,
    figures: svgs.length,
    smallest: Math.min(...svgs.map(box => Math.min(box.width, box.height))),
    beyond: Math.max(...svgs.map(box => box.right)),
    background: body.backgroundColor,
    colour: body.color,
    texts: document.body.textContent.includes("<script>document.title = 'ran'<" + "/script>"),
    columns: new Set([...document.querySelectorAll('.beside')[0].children]
      .map(child => child.getBoundingClientRect().left)).size,
  });
  parent.postMessage(JSON.stringify(seen), '*');
});
</script>
"""
#: The page in a frame of some width, and what the probe in it has seen.
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<pre id="probe"></pre>
<script>addEventListener('message', event => { probe.textContent = event.data; });</script>
<iframe src="probed.html" style="width: %dpx; height: 900px; border: 0"></iframe>
"""


def browser() -> str:
    """The path of a browser; without one the test is skipped, or fails where one is promised."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("PERSONA_NEEDS_BROWSER"):
        pytest.fail("PERSONA_NEEDS_BROWSER is set and there is no chromium on PATH")
    pytest.skip("no chromium on PATH")


def look(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            browser(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--hide-scrollbars", "--enable-logging=stderr"),
            f"--user-data-dir={page.parent / 'browser'}",
            *flags,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )


@pytest.fixture(scope="module")
def probed(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One page with a run of every command, and the probe in its head."""
    browser()
    out = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "save", lambda *arguments: None)  # the page alone
        page = write_report(list(runs.values()), out)
    html = page.read_text("utf-8")
    assert html.count("<head>") == 1
    (out / "probed.html").write_text(html.replace("<head>", f"<head>{PROBE}"), "utf-8")
    return out / "probed.html"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(probed: Path, width: int, scheme: str) -> None:
    frame = probed.parent / f"{width}.html"
    frame.write_text(FRAME % width)
    shown = look(
        frame,
        *("--dump-dom", "--virtual-time-budget=5000", "--window-size=1400,1000"),
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    )
    found = re.search(r'<pre id="probe">(.+?)</pre>', shown.stdout, re.DOTALL)
    assert found, shown.stderr
    seen = json.loads(unescape(found[1]))
    assert "CONSOLE" not in shown.stderr
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["resources"] == 0
    # The script in the personas and in the texts is text: only the probe ran.
    assert seen["texts"]
    assert seen["title"] == "6 runs"
    assert seen["scripts"] == 1
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["figures"] > 50
    assert seen["smallest"] > 100
    assert seen["beyond"] <= width
    assert seen["columns"] == (1 if width == 390 else 4)
    page, ink = (
        luminance(tuple(int(value) / 255 for value in re.findall(r"\d+", seen[name])[:3]))
        for name in ("background", "colour")
    )
    assert (page < 0.05 and ink > 0.5) if scheme == "dark" else (page > 0.9 and ink < 0.05)


#: What nobody should be able to have a page do, in the words of texts that others wrote.
ATTACK = (
    '"><img src=x onerror="document.title=\'ran\'"><svg onload="document.title=\'ran\'">'
    "</style></title></svg><script>document.title='ran'</script>--><!--]]>"
    "<a href=\"javascript:document.title='ran'\">click</a> {{ 7 * 7 }} $\\frac{$ &lt;b&gt; "
    "<meta http-equiv=refresh content='0; url=https://elsewhere.invalid'>"
)


def attacked(value: Any) -> Any:
    """JSON-like data with the attack in the place of every text that may be any."""
    if isinstance(value, dict):
        return {key: attacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [attacked(item) for item in value]
    return f"{value} {ATTACK}" if isinstance(value, str) else value


def attack(run: Path) -> None:
    """Put the attack everywhere in a run where a report would show it."""
    for directory in (run, *(path for path in run.iterdir() if path.is_dir())):
        data = json.loads((directory / "run.json").read_text())
        grid = data.get("grid")
        kept = {name: data[name] for name in ("format", "command", "complete")}
        if grid:
            kept["grid"] = {
                **grid,
                "personas": attacked(grid["personas"]),
                "tasks": attacked(grid["tasks"]),
                "baseline": attacked(grid["baseline"]),
            }
        texts = {name: attacked(data[name]) for name in data.keys() - kept.keys()}
        backend = {"host": ATTACK, "jobs": [1]}
        (directory / "run.json").write_text(json.dumps({**texts, **kept, "backend": backend}))
        if (directory / "text.jsonl").exists():
            lines = (directory / "text.jsonl").read_text().splitlines()
            made = [json.loads(line) for line in lines]
            changed = [{**text, "text": f"{text['text']} {ATTACK}"} for text in made]
            (directory / "text.jsonl").write_text("\n".join(map(json.dumps, changed)))
        for path in directory.glob("*.csv"):
            table = read_table(path)
            for name in {"hits", "published_model"} & set(table.columns):
                table[name] = ATTACK
            table.to_csv(path, index=False)


def test_words_in_a_figure_stay_words() -> None:
    """Names come from tables, which hold no such thing; the drawing does not rely on it."""
    line = Line("<b>", EQUALS[0], (1, 2), (0.1, 0.2))
    panel = line_panel(ATTACK, [line], x_label=ATTACK, y_label=ATTACK, ticks=[(1, ATTACK)])
    drawn = inline_svg(panel, "u")
    elements = set(re.findall(r"<([a-zA-Z]+)", drawn))
    assert elements <= {"svg", "defs", "g", "path", "text", "use", "clipPath", "rect"}
    assert drawn.count("&lt;img src=x onerror=") >= 3


#: Put at the start of the page, before its policy: says at the end what the page came to be.
WITNESS = """<script>
const seen = {blocked: []};
document.addEventListener('securitypolicyviolation', e => seen.blocked.push(e.violatedDirective));
addEventListener('load', () => setTimeout(() => {
  const all = [...document.querySelectorAll('*')];
  seen.title = document.title;
  seen.names = [...new Set(all.map(node => node.localName))];
  seen.scripts = document.scripts.length;
  seen.handlers = all.flatMap(node => [...node.attributes])
    .filter(found => found.name.startsWith('on')).length;
  seen.links = all.flatMap(node => [...node.attributes])
    .filter(found => ['href', 'src', 'xlink:href', 'action'].includes(found.name))
    .map(found => found.value).filter(value => !value.startsWith('#') && value !== 'data:,');
  seen.shown = document.body.textContent.split("document.title='ran'").length - 1;
  const said = document.createElement('pre');
  said.id = 'said';
  said.textContent = JSON.stringify(seen);
  document.body.append(said);
}, 500));
</script>
"""


def witnessed(page: Path, put: str = "", policy: bool = True) -> dict[str, Any]:
    """What a browser makes of a page, with `put` at the end of its body."""
    html = page.read_text("utf-8")
    html = html.replace("<head>", f"<head>{WITNESS}", 1).replace("</body>", f"{put}</body>", 1)
    if not policy:
        html = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", html, count=1)
    changed = page.with_name("witnessed.html")
    changed.write_text(html, "utf-8")
    shown = look(changed, "--dump-dom", "--virtual-time-budget=5000")
    found = re.search(r'<pre id="said">(.+?)</pre>', shown.stdout, re.DOTALL)
    assert found, shown.stderr
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.parametrize("command", MAKERS)
def test_texts_of_others_stay_texts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser()
    monkeypatch.setattr(writing, "save", lambda *arguments: None)  # the page alone
    run = MAKERS[command](tmp_path / "run")
    attack(run)
    # Without its policy, so that nothing but the escaping is tested.
    seen = witnessed(write_report([run]), policy=False)
    assert seen["title"] != "ran"
    assert seen["shown"] > 10
    assert seen["scripts"] == 1  # the witness
    assert seen["handlers"] == 0
    assert seen["links"] == []
    assert not {"img", "a", "iframe", "object", "embed", "form", "base"} & set(seen["names"])


#: What would run or fetch something if it were in the page after all.
SLIPPED = """<script>document.title = 'ran'</script>
<img src="data:," onerror="document.title = 'ran'">
<iframe srcdoc="<script>parent.document.title = 'ran'</script>"></iframe>
<img src="{url}/image"><script src="{url}/script"></script>
<link rel="stylesheet" href="{url}/style"><object data="{url}/object"></object>
<style>@import "{url}/import"; body {{ background: url({url}/background) }}</style>
"""


@pytest.mark.parametrize("policy", [True, False], ids=["policy", "no policy"])
def test_a_page_runs_and_fetches_nothing(
    policy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where something slipped in; without the policy it would."""
    browser()
    monkeypatch.setattr(writing, "save", lambda *arguments: None)
    page = write_report([capture(tmp_path / "run")])
    asked: list[str] = []

    class Outside(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Outside) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        put = SLIPPED.format(url=f"http://127.0.0.1:{server.server_port}")
        seen = witnessed(page, put, policy=policy)
        server.shutdown()
    if policy:
        assert seen["title"] != "ran"
        assert asked == []
        assert {name.split("-")[0] for name in seen["blocked"]} >= {"script", "img", "style"}
    else:
        assert seen["title"] == "ran"
        assert {"/image", "/script", "/style"} <= set(asked)


def test_the_page_makes_a_picture(probed: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    look(probed, f"--screenshot={shot}", "--window-size=390,2000")
    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (390, 2000)
        assert len(image.convert("L").getcolors() or []) > 20
