"""README.md says what the program prints: its blocks are generated again and compared."""

from __future__ import annotations

import re
from difflib import SequenceMatcher, unified_diff
from pathlib import Path

import pytest
from cogapp import Cog  # type: ignore[import-untyped]

from persona_nnsight import Model

ROOT = Path(__file__).parents[1]

#: A number, with a percent sign if it has one, or else a word, or any other character.
TOKEN = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?!\w)( ?%)?|\w+|[^\w\s]")


@pytest.mark.slow
@pytest.mark.smollm2
def test_generated_blocks(smollm2: Model) -> None:
    committed = (ROOT / "README.md").read_text(encoding="utf-8")
    generated = Cog().process_string(committed, "README.md")
    changes = drift(committed, generated)
    assert not changes, (
        f"README.md does not say what the program prints now.\n{changes}\n"
        "If the change is meant, run `make readme` and read what changed."
    )


def drift(committed: str, generated: str) -> str:
    """What differs by more than spaces and the last digits of numbers, as a diff."""
    old, new = committed.splitlines(), generated.splitlines()
    matcher = SequenceMatcher(None, [shape(line) for line in old], [shape(line) for line in new])
    for i, j, size in matcher.get_matching_blocks():
        for k in range(size):
            if close(old[i + k], new[j + k]):
                new[j + k] = old[i + k]
    return "\n".join(unified_diff(old, new, "README.md", "generated now", n=1, lineterm=""))


def shape(line: str) -> str:
    """A line without the values of its numbers and the widths of its columns."""
    return " ".join("#" if match[1] else match[0] for match in TOKEN.finditer(line))


def close(was: str, now: str) -> bool:
    """Whether the numbers of two lines of one shape are those that another CPU may give."""
    for old, new in zip(TOKEN.finditer(was), TOKEN.finditer(now), strict=True):
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
        ("12 cells", "13 cells", True),
        ("smollm2-135m", "smollm2-360m", True),
        ("p_last additive 0.045", "p_last by 0.045", True),
        ("one line", "one line\nand another", True),
    ],
)
def test_what_counts_as_drift(was: str, now: str, drifts: bool) -> None:
    assert bool(drift(was, now)) is drifts


@pytest.mark.parametrize("file", ["README.md", "CHANGELOG.md", "outputs/README.md"])
def test_links_lead_somewhere(file: str) -> None:
    page = ROOT / file
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        path, _, anchor = target.partition("#")
        aim = page.parent / path if path else page
        assert aim.exists(), f"{file} links to {target}, which does not exist"
        if anchor:
            text = aim.read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in anchors, target
    assert targets or file != "README.md"
