"""`persona jobs`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from persona_cli.console import notes, output, titled
from persona_cli.options import Insecure
from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    from persona_nnsight.backends.ndif.ledger import Ledger


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
        print(json.dumps({"host": host, "jobs": found}, indent=1, ensure_ascii=False))
        return
    output().print(titled(f"{len(found)} jobs with {host}", _table(found)))
    if verbose:
        for number, job in enumerate(found, start=1):
            if job["description"]:
                output().print(Text(f"\njob {number}: {job['description']}"))


def _finished(directory: Path) -> tuple[str, list[dict[str, Any]]] | None:
    """Host and jobs of a finished run; None where there is none."""
    path = directory / "run.json"
    if not path.exists():
        return None
    try:
        where = json.loads(path.read_text(encoding="utf-8")).get("backend") or {}
        return str(where["host"]), list(where["jobs"])
    except KeyError:
        raise PersonaError(
            f"The run in {str(directory)!r} had no jobs: it was made on one machine."
        ) from None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise PersonaError(
            f"{str(path)!r} cannot be read ({error}); is it a run of ours?"
        ) from error


def _pending(directory: Path, *, insecure: bool) -> tuple[str, list[dict[str, Any]]]:
    from persona_nnsight.backends.ndif.ledger import Ledger

    ledger = Ledger.load(directory)
    _ask(ledger, insecure=insecure)
    return ledger.host, [asdict(job) for job in ledger.jobs.values()]


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
                notes.print(f"{ledger.host} does not answer ({error}); this is what was known.")
                return
            if answer is None:
                job.description = "the server knows nothing of it"
            else:
                job.status, job.description = answer.status, answer.description


def _table(found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "cells"):
        table.add_column(heading, justify="right")
    for heading in ("state", "server says", "id", "sent"):
        table.add_column(heading, overflow="fold")
    for heading in ("queued", "ran", "up", "down", "times"):
        table.add_column(heading, justify="right")
    for number, job in enumerate(found, start=1):
        last = job["description"].strip().splitlines()[-1:] or [""]
        sent = job["sent"]
        table.add_row(
            str(number),
            str(job["cells"]),
            job["state"],
            Text(f"{job['status']} {last[0]}".strip()[:60]),
            job["id"] or "-",
            f"{datetime.fromtimestamp(sent):%d %b %H:%M:%S}" if sent else "-",
            _seconds(job["queue_seconds"]),
            _seconds(job["run_seconds"]),
            _bytes(job["bytes_up"]),
            _bytes(job["bytes_down"]),
            str(job["attempts"]),
        )
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _bytes(value: int) -> str:
    from persona_nnsight.models.weights.model_files import human_size

    return human_size(value) if value else "-"
