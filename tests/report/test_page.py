"""What is on a page: every command's sections, labels, texts and where they come from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from made_runs import (
    CONDITIONS,
    FIGURES,
    LAYERS,
    MAKERS,
    POSITIONS,
    a_grid,
    inject,
    manifest,
    write_run,
)

from persona_nnsight.pages.generations import highlight
from persona_nnsight.report.write import write_report

FINDING = "At p_last the additive vector is < its controls & so on."

#: Command: the headings of its sections.
HEADINGS = {
    "substitute": ("What changes when one residual is overwritten?", "In numbers"),
    "inject": ("Can the persona be written into a prompt that does not name it?", "In numbers"),
    "markers": ("Does the text still show the persona?", "In numbers", "Generated texts"),
    "steer": ("What do other strengths of the two effects do?", "In numbers", "Generated texts"),
    "capture": ("Do the effects add up in the residual stream?",),
    "reproduce": ("Figure 1", "Beside the published numbers"),
}


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
    def findings(tables: Mapping[str, pd.DataFrame]) -> list[str]:
        return [FINDING]

    for name in ("Inject", "Capture"):
        place = f"persona_nnsight.experiments.{name.lower()}.{name}.findings"
        monkeypatch.setattr(place, findings)
    page = write_report([runs["inject"], runs["capture"]], tmp_path).read_text("utf-8")
    assert page.count("<li>At p_last the additive vector is &lt; its controls &amp; so on.") == 2


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
