"""`persona report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_cli.console import say, spinner


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…", help="Run directories, such as outputs/substitute-smollm2-135m-short-1."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the page and its figures go; if left out, into the run's own directory, "
            "or for several runs into outputs/report-N.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page to read about one or several runs, with figures.

    Reads finished (or interrupted) run directories and writes report.html, one file that needs no
    network and follows the light or dark setting of the reader, and figures/ with every figure
    as PNG and SVG. An earlier report in the same place is replaced.

    Example: persona report outputs/substitute-smollm2-135m-short-1
    """
    from persona_nnsight.report.write import write_report
    from persona_nnsight.storage.run_directory import default_directory

    if out is None and len(runs) > 1:
        out = default_directory("report")
    with spinner("Drawing the figures"):
        page = write_report(runs, out)
    say(page)
    say(page.parent / "figures")
