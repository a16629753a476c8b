"""The pages say what the program prints: their blocks are generated again and compared."""

from __future__ import annotations

import re
from difflib import SequenceMatcher, unified_diff
from pathlib import Path

import pytest
from cogapp import Cog  # type: ignore[import-untyped]
from persona_cli.app import app
from typer.main import get_command

from persona_nnsight import Model

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

#: A number, with a percent sign if it has one, or else a word, or any other character.
TOKEN = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?!\w)( ?%)?|\w+|[^\w\s]")


#: Pages that show the same runs, side by side and the costly ones first. A worker takes neighbours,
#: and others take from the end what it has not begun, so that most runs are made by one worker.
SHARING = [
    *("docs/commands/substitute.md", "docs/reading-the-numbers.md", "docs/commands/inject.md"),
    *("docs/commands/steer.md", "docs/commands/vectors.md"),
    *("README.md", "docs/commands/report.md", "docs/run-directories.md"),
    "docs/commands/capture.md",
]
#: README.md and docs/: what `make docs` generates.
ALL = {"README.md", *(page.relative_to(ROOT).as_posix() for page in DOCS.rglob("*.md"))}
PAGES = [*SHARING, *sorted(ALL - set(SHARING))]
LINKED = [*PAGES, "CHANGELOG.md", "SECURITY.md", "outputs/README.md"]


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("page", PAGES)
def test_generated_blocks(smollm2: Model, page: str) -> None:
    committed = (ROOT / page).read_text(encoding="utf-8")
    generated = Cog().process_string(committed, page)
    changes = drift(committed, generated)
    assert not changes, (
        f"{page} does not say what the program prints now.\n{changes}\n"
        f"If the change is meant, run `make docs PAGES={page}` and read what changed."
    )


#: ``89 % (layers 12 and 16 to 18)``: layers whose shares are the same whole number of percent.
SHARES = re.compile(r"(\d+) % \(layers? (\d+(?:(?:, | and | to )\d+)*)\)(?:, )?")


def drift(committed: str, generated: str) -> str:
    """What differs by more than spaces and the last digits of numbers, as a diff."""
    old, new = paragraphs(committed), paragraphs(generated)
    matcher = SequenceMatcher(None, [shape(text) for text in old], [shape(text) for text in new])
    for i, j, size in matcher.get_matching_blocks():
        for k in range(size):
            if close(old[i + k], new[j + k]):
                new[j + k] = old[i + k]
    was, now = ("\n\n".join(texts).splitlines() for texts in (old, new))
    return "\n".join(unified_diff(was, now, "committed", "generated now", n=1, lineterm=""))


def paragraphs(text: str) -> list[str]:
    """What stands between blank lines: where a sentence is broken may depend on its numbers."""
    return re.split(r"\n(?:[ \t]*\n)+", text)


def shape(text: str) -> str:
    """A text without the values of its numbers, its line ends and the widths of its columns."""
    return " ".join("#" if match[1] else match[0] for match in TOKEN.finditer(layer_by_layer(text)))


def layer_by_layer(text: str) -> str:
    """A text in which every layer has its share: 88.6 % may go with 88 % or with 89 %."""

    def each(match: re.Match[str]) -> str:
        layers = re.findall(r"\d+(?: to \d+)?", match[2])
        spans = [[int(end) for end in layer.split(" to ")] for layer in layers]
        numbers = [n for span in spans for n in range(span[0], span[-1] + 1)]
        return "".join(f"{match[1]} % at layer {n}; " for n in numbers)

    return SHARES.sub(each, " ".join(text.split()))


def close(was: str, now: str) -> bool:
    """Whether the numbers of two texts of one shape are those that another CPU may give."""
    old_tokens, new_tokens = (TOKEN.finditer(layer_by_layer(text)) for text in (was, now))
    for old, new in zip(old_tokens, new_tokens, strict=True):
        if old[1] is None:
            continue
        whole = old[1].lstrip("-").isdigit() and new[1].lstrip("-").isdigit()
        tolerance = (1 if old[2] else 0) if whole else 0.002
        if abs(float(old[1]) - float(new[1])) > tolerance + 1e-9:
            return False
    return True


@pytest.mark.parametrize(
    ("was", "now", "drifts"),
    [
        ("p_last additive  0.045 9 %", "p_last additive 0.047 10 %", False),
        ("a clean -0.000", "a clean  0.000", False),
        ("p_last additive 0.045", "p_last additive 0.048", True),
        ("recovers 88 %", "recovers 86 %", True),
        (
            "recovers 88 % (layer 8), 89 % (layers 12 and 16)\nof what",
            "recovers 88 % (layers 8 and 12), 89 % (layer 16) of\nwhat",
            False,
        ),
        (
            "recovers 89 % (layers 8 to 10)",
            "recovers 89 % (layers 8 and 9), 88 % (layer 10)",
            False,
        ),
        ("recovers 89 % (layers 8 to 10)", "recovers 89 % (layers 8 and 9)", True),
        ("recovers 86 % (layer 8), 89 % (layer 12)", "recovers 89 % (layers 8 and 12)", True),
        ("12 cells", "13 cells", True),
        ("smollm2-135m", "smollm2-360m", True),
        ("p_last additive 0.045", "p_last by 0.045", True),
        ("one line", "one line\nand another", True),
    ],
)
def test_what_counts_as_drift(was: str, now: str, drifts: bool) -> None:
    assert bool(drift(was, now)) is drifts


def anchors(page: Path) -> list[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


@pytest.mark.parametrize("file", LINKED)
def test_links_lead_somewhere(file: str) -> None:
    page = ROOT / file
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        path, _, anchor = target.partition("#")
        aim = page.parent / path if path else page
        assert aim.exists(), f"{file} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(aim), f"{file} links to {target}"
    assert targets or file != "README.md"


def test_every_page_is_listed() -> None:
    """In docs/README.md, or with the commands."""
    index = (DOCS / "README.md", DOCS / "commands" / "README.md")
    listed = {
        (page.parent / target).resolve()
        for page in index
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
    }
    assert {page.resolve() for page in DOCS.rglob("*.md")} - {index[0].resolve()} <= listed


def test_every_command_has_its_page() -> None:
    commands = {path.stem for path in (DOCS / "commands").glob("*.md")} - {"README"}
    assert commands == {str(name) for name in get_command(app).commands}  # type: ignore[attr-defined]


def test_sections_that_are_cited_exist() -> None:
    """``docs/method.md §3``: the sections of that page are numbered."""
    numbered = re.findall(r"^## (\d+)\. ", (DOCS / "method.md").read_text("utf-8"), re.MULTILINE)
    assert numbered == [str(number + 1) for number in range(len(numbered))]
    for folder in ("persona_nnsight", "cli", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for cited in re.findall(
                r"docs/method\.md §§?(\d+(?:(?:, §?| and | to )\d+)*)", path.read_text("utf-8")
            ):
                assert set(re.findall(r"\d+", cited)) <= set(numbered), f"{path}: §{cited}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
