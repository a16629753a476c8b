"""A page's tables hold the numbers of the csv, and those of the paper beside them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from made_runs import a_grid, inject, kl_rows, manifest, reproduce, write_run

from persona_nnsight.analysis.columns import read_table
from persona_nnsight.pages import numbers
from persona_nnsight.report.write import write_report


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


def test_tables_hold_the_numbers_of_the_csv(pages: dict[str, str], runs: dict[str, Path]) -> None:
    for command in ("substitute", "inject", "steer"):
        for row in read_table(runs[command] / "summary.csv").to_dict("records"):
            words = [row["position"], row["layers"], row["condition"]]
            words += [numbers.plain(row[name]) for name in ("alpha", "beta") if name in row]
            values = [row["median"], row["n"]]
            values += [
                row[name]
                for name in ("recovered", "gap_closed", "recovered_pooled", "gap_closed_pooled")
                if name in row and not math.isnan(row[name])
            ]
            assert has_row(pages[command], words, values), row
        for row in read_table(runs[command] / "contrasts.csv").to_dict("records"):
            words = [row["position"], row["layers"], row["condition"], row["control"]]
            words.append(row["verdict"])
            assert has_row(pages[command], words, [row["difference"], row["lower"]]), row
    for row in read_table(runs["markers"] / "summary.csv").to_dict("records"):
        values = [row["any"], row["distinct"], row["n"]]
        assert has_row(pages["markers"], [row["condition"], row["layers"]], values), row
    assert not has_row(pages["substitute"], ["p_last", "additive"], [123.456])


def test_intervals_are_written_out(pages: dict[str, str], runs: dict[str, Path]) -> None:
    row = read_table(runs["inject"] / "summary.csv").iloc[0]
    low, high = f"{row['median_lo']:.4f}", f"{row['median_hi']:.4f}"
    assert f'<td class="n">{low} to {high}</td>' in pages["inject"]


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


def test_captions_say_what_was_drawn_and_what_holds_at_once(pages: dict[str, str]) -> None:
    at_once = "The intervals of this table hold all at once (max-T): "
    for command, drawn in (
        ("substitute", "4 personas and 3 tasks, both drawn."),
        ("inject", "4 personas and 3 tasks, both drawn."),
        ("markers", "4 personas and 3 tasks, both drawn."),
        ("steer", "2 personas and 3 tasks, both drawn."),
    ):
        assert f"Each 95 % interval is by itself: {drawn}" in pages[command]
        assert at_once + drawn in pages[command]
        assert "Intervals and verdicts are of these " in pages[command]
    assert "verdict</th>" in pages["substitute"]


@pytest.mark.parametrize("command", ["substitute", "inject", "markers", "steer"])
def test_runs_of_before_the_verdicts_are_read(
    runs: dict[str, Path], tmp_path: Path, command: str
) -> None:
    """Their tables lack the columns, and no page says that their intervals are what ours are."""
    run = shutil.copytree(runs[command], tmp_path / "old")
    new = ["floor", "recovered_pooled", "gap_closed_pooled", "margin", "verdict"]
    for name in ("summary", "contrasts"):
        table = pd.read_csv(run / f"{name}.csv", keep_default_na=False)
        table.drop(columns=new, errors="ignore").to_csv(run / f"{name}.csv", index=False)
    page = write_report([run]).read_text("utf-8")
    assert "95 % interval" in page
    for absent in ("at once", "drawn.", "verdict</th>", "floor</th>", "pooled</th>"):
        assert absent not in page
    assert re.search("undecided|costs (less|more) than|there are (fewer|more)", page, re.IGNORECASE)


def test_values_that_are_not_finite_are_dashes(tmp_path: Path) -> None:
    run = inject(tmp_path / "run")
    for name in ("kl", "summary"):
        table = pd.read_csv(run / f"{name}.csv")
        table.loc[0, "kl" if name == "kl" else "median"] = float("inf")
        table.loc[1, "gap_closed"] = float("nan")
        table.to_csv(run / f"{name}.csv", index=False)
    assert '<data value="inf">∞</data>' in write_report([run]).read_text("utf-8")


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
