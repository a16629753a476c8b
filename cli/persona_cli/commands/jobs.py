"""`persona jobs`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from persona_cli.console import note, output, plain, show_json, titled
from persona_cli.options import Insecure
from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    from persona_nnsight.backends.ndif.ledger import Job, Ledger


def jobs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    insecure: Insecure = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The records as JSON on standard output.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also all that the server said of each job.")
    ] = False,
) -> None:
    """Show the jobs of a run on an NDIF server, and how they are now.

    Of a run that is not finished the server is asked; nothing is collected (`persona resume` does
    that). Of a finished one the record in run.json is shown.

    Example: persona jobs outputs/substitute-gemma-2-2b-it-long-1
    """
    host, found = _finished(directory) or _pending(directory, insecure=insecure)
    if as_json:
        show_json({"host": host, "jobs": [asdict(job) for job in found]})
        return
    output().print(titled(f"{len(found)} jobs with {host}", _table(found)))
    if verbose:
        for number, job in enumerate(found, start=1):
            if job.description:
                output().print(plain(f"\njob {number}: {job.description}"))


def _finished(directory: Path) -> tuple[str, list[Job]] | None:
    """Host and jobs of a finished run; None where there is none."""
    from persona_nnsight.backends.ndif.ledger import job_from

    path = directory / "run.json"
    if not path.exists():
        return None
    try:
        where = json.loads(path.read_text(encoding="utf-8")).get("backend") or {}
        if "host" not in where or "jobs" not in where:
            raise PersonaError(
                f"The run in {str(directory)!r} had no jobs: it was made on one machine."
            )
        return str(where["host"]), [job_from(job) for job in where["jobs"]]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise PersonaError(
            f"{str(path)!r} cannot be read ({error}); is it a run of ours?"
        ) from error


def _pending(directory: Path, *, insecure: bool) -> tuple[str, list[Job]]:
    from persona_nnsight.backends.ndif.ledger import Ledger

    ledger = Ledger.load(directory)
    _ask(ledger, insecure=insecure)
    return ledger.host, list(ledger.jobs.values())


def _ask(ledger: Ledger, *, insecure: bool) -> None:
    """Bring the server's last word on the jobs that it has."""
    from persona_nnsight.backends.ndif.ledger import SENT
    from persona_nnsight.backends.ndif.server import NoAnswerError, Server

    # Asking after a job needs no key, and a directory is not to say where the key is sent.
    server = Server(ledger.host, insecure=insecure, with_key=False)
    for job in ledger.jobs.values():
        if job.state == SENT and job.id is not None:
            try:
                answer = server.ask(job.id)
            except NoAnswerError as error:
                note(f"{ledger.host} does not answer ({error}); this is what was known.")
                return
            if answer is None:
                job.description = "the server knows nothing of it"
            else:
                job.status, job.description = answer.status, answer.description


def _table(found: Sequence[Job]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "cells"):
        table.add_column(heading, justify="right")
    for heading in ("state", "server says", "id", "sent"):
        table.add_column(heading, overflow="fold")
    for heading in ("queued", "ran", "up", "down", "times"):
        table.add_column(heading, justify="right")
    for number, job in enumerate(found, start=1):
        last = job.description.strip().splitlines()[-1:] or [""]
        table.add_row(
            str(number),
            str(job.cells),
            plain(job.state),
            plain(f"{job.status} {last[0]}".strip()[:60]),
            plain(job.id or "-"),
            _moment(job.sent),
            _seconds(job.queue_seconds),
            _seconds(job.run_seconds),
            _bytes(job.bytes_up),
            _bytes(job.bytes_down),
            str(job.attempts),
        )
    return table


def _moment(seconds: float | None) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%d %b %H:%M:%S}" if seconds else "-"
    except (OverflowError, ValueError, OSError):
        return "-"  # of no calendar


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _bytes(value: int) -> str:
    from persona_nnsight.models.weights.model_files import human_size

    return human_size(value) if value else "-"
