"""Drawing: names that stand apart, room for long ones, colours that can be read."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from colours import contrast
from made_runs import a_grid, kl_rows, substitute

from persona_nnsight.analysis.kl_tables import kl_summary
from persona_nnsight.pages.figures import canvas
from persona_nnsight.pages.figures.canvas import inline_svg
from persona_nnsight.pages.figures.lines import EQUALS, Line, line_panel
from persona_nnsight.pages.figures.substitute import cell_dots
from persona_nnsight.prompts.grids import Grid
from persona_nnsight.report import write as writing
from persona_nnsight.report.write import write_report


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
