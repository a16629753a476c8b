"""The page of verdicts: its table is read, compared with a run, and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from architectures.building import IMAGE_TEXT, TEXT, Architecture, architectures
from architectures.verdict import ORDER, Verdict

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_TITLES = {TEXT: "Text", IMAGE_TEXT: "Images and text"}

Rows = dict[Architecture, tuple[str, str]]
"""By architecture: its verdict, and what the page says beside it."""


def rows_of(verdicts: Sequence[Verdict]) -> Rows:
    """What the page is to say of some verdicts."""
    return {each.architecture: (each.verdict, _cell(_told(each))) for each in verdicts}


def _told(verdict: Verdict) -> str:
    other = verdict.loaded not in ("", verdict.architecture.class_name)
    return f"{verdict.told}; loaded as {verdict.loaded}" if other else verdict.told


def read_page() -> Rows:
    """What the page says now."""
    rows: Rows = {}
    task = TEXT
    titles = {f"## {title}": task for task, title in _TITLES.items()}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        task = titles.get(line, task)
        if line.startswith("| `"):
            model_type, class_name, verdict, told = (
                cell.strip() for cell in line.strip("|").split(" | ")
            )
            architecture = Architecture(task, model_type.strip("`"), class_name.strip("`"))
            rows[architecture] = (verdict, told)
    return rows


def disagreements(page: Rows, found: Rows, *, everything: bool) -> list[str]:
    """Where the page has other words for a verdict than a run.

    Args:
        page: what it says.
        found: what came of the run.
        everything: the run was of all architectures, and the page may have no others.
    """
    told = []
    for architecture in sorted({*found, *(page if everything else ())}):
        said, is_now = (rows.get(architecture, ("nothing", ""))[0] for rows in (page, found))
        if said != is_now:
            told.append(f"{architecture.model_type} ({architecture.task}): {said}, now {is_now}")
    return told


def write_page(rows: Rows) -> None:
    """Put the rows of what transformers has on the page, between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    known = {each: rows[each] for each in architectures() if each in rows}
    page = _between(page, "counts", _counts(known))
    page = _between(page, "tables", "\n\n".join(_table(task, known) for task in _TITLES))
    PAGE.write_text(page, encoding="utf-8")


def _between(page: str, name: str, text: str) -> str:
    """The page with a text between the marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def _counts(rows: Rows) -> str:
    counts = Counter(verdict for verdict, _ in rows.values())
    return (
        f"Of {len(rows)} classes: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])
        + "."
    )


def _table(task: str, rows: Mapping[Architecture, tuple[str, str]]) -> str:
    lines = [f"## {_TITLES[task]}", "", "| Model type | Class | Verdict | |", "|---|---|---|---|"]
    lines += [
        f"| `{each.model_type}` | `{each.class_name}` | {verdict} | {told} |"
        for each, (verdict, told) in rows.items()
        if each.task == task
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text in a table, where lines and bars would end a cell, and signs would be marks."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
