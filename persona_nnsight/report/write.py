"""Writing a report: ``report.html`` and ``figures/``, whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from persona_nnsight.errors import PersonaError, escaped
from persona_nnsight.pages.blocks import RunPage
from persona_nnsight.pages.figures.canvas import save
from persona_nnsight.report.reading import read_run
from persona_nnsight.report.sections import pictures, run_page
from persona_nnsight.storage.files import our_directory, put, workshop
from persona_nnsight.storage.run_directory import ANOTHER_OUT

_PAGE = "report.html"
#: How a page says that it is ours, and which figures belong to it.
_GENERATOR = '<meta name="generator" content="persona report">'
#: What a browser may do with a page: show it. No script runs and nothing is fetched, whatever a
#: text of a model or of a grid may have slipped in.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
_STEM = re.compile(r'<figure data-file="([A-Za-z0-9.-]+)"')


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one self-contained page about runs, and its figures as files.

    An earlier report in the same place is replaced, with the figures that it alone had; nothing
    else there is touched. The same runs give the same bytes.

    Args:
        runs: run directories, in the order of the page.
        out: directory for ``report.html`` and ``figures/*.png`` and ``*.svg``; with a single run
            its own directory if left out.

    Returns:
        The path of ``report.html``.

    Raises:
        PersonaError: no run, several and no `out`, a directory that is no run, a damaged file in
            one, or a place that cannot be written to.
    """
    if not runs:
        raise PersonaError("No run was named; give one or more run directories.")
    if out is None:
        if len(runs) > 1:
            raise PersonaError(
                f"A report on {len(runs)} runs belongs to none of them; say where it goes with out."
            )
        out = runs[0]
    read = [read_run(Path(run)) for run in runs]
    single = len(read) == 1
    pages = [run_page(run, "" if single else f"{i}-") for i, run in enumerate(read, start=1)]
    html = render(pages)
    try:
        _write(Path(out), html, pages)
    except OSError as error:
        raise PersonaError(
            f"The report cannot be written to {str(out)!r} ({error.strerror or error}); choose "
            "another --out."
        ) from error
    return Path(out) / _PAGE


def render(pages: Sequence[RunPage]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("persona_nnsight.report"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    css = files("persona_nnsight.report") / "templates" / "report.css"
    return environment.get_template("report.html.j2").render(
        pages=pages,
        css=Markup(css.read_text(encoding="utf-8")),
        generator=Markup(_GENERATOR),
        policy=Markup(_POLICY),
    )


def _shown(value: object) -> object:
    """A text in the page: what a browser would obey or hide is shown; our own HTML has none."""
    return escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _write(out: Path, html: str, pages: Sequence[RunPage]) -> None:
    """Build the report beside its place, then move it there; the page last."""
    our_directory(out, ANOTHER_OUT)
    old = _figures_of(out / _PAGE)
    figures = out / "figures"
    our_directory(figures, ANOTHER_OUT, named=False)
    with workshop(out) as built:
        for page in pages:
            for picture in pictures(page):
                save(picture.figure, built, picture.stem)
        new = sorted(os.listdir(built))
        (built / _PAGE).write_text(html, encoding="utf-8", newline="\n")
        for name in new:
            put(built / name, figures / name)
        put(built / _PAGE, out / _PAGE)
    for name in old - set(new):
        (figures / name).unlink(missing_ok=True)


def _figures_of(page: Path) -> set[str]:
    """The files of the figures of an earlier report; none where the page is not ours."""
    if not page.is_file():
        return set()
    try:
        html = page.read_text(encoding="utf-8")
    except (FileNotFoundError, ValueError):
        return set()
    if _GENERATOR not in html:
        return set()
    return {f"{stem}.{kind}" for stem in _STEM.findall(html) for kind in ("png", "svg")}
