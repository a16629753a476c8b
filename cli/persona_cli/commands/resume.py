"""`persona resume`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from persona_cli.console import notes, plain
from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.registry import NAMES
from persona_nnsight.storage.files import check_ours
from persona_nnsight.storage.run_directory import RUN, clear_journal

#: What only the user can say, and not a directory that may be somebody else's.
TRUST = "--trust-remote-code"

#: Commands whose runs can be gone on with; a directory can have no other run again.
EXPERIMENTS = (*NAMES, "reproduce")


def resume(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory of a run that is not finished.")
    ],
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="With jobs on a server: collect what is done, send what is missing, do not wait.",
        ),
    ] = False,
    ndif_host: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Confirms the server of a run that is not nnsight's configured one: the API key "
            "is sent there.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Confirms that the run may execute code that comes with its checkpoint.",
        ),
    ] = False,
) -> None:
    """Go on with a run that was stopped, or collect one whose jobs are with an NDIF server.

    What is finished is taken as it is, what is missing is computed, and then the tables are
    written; they are the same, byte by byte, as those of a run that was not stopped. Jobs that a
    server has are collected, and sent again where it lost them. The command is run again as it was
    typed, in the directory where it was typed; if it would compute something else by now (another
    grid file, model, dtype or version), that is refused with the difference.

    Example: persona resume outputs/substitute-gemma-2-2b-it-long-1
    """
    from persona_nnsight.backends.ndif.ledger import BACKEND, Ledger
    from persona_nnsight.storage.journal import Journal

    target = directory.absolute()
    if target.is_dir():
        check_ours(target, "copy it to a directory of your own and go on with it there")
    if (target / RUN).exists():
        clear_journal(target)  # of a process that was killed between the last file and this
        raise PersonaError(f"The run in {str(directory)!r} is finished; nothing is left to do.")
    journal = Journal.load(target)
    origin = journal.origin
    if origin is None or not origin.argv or origin.argv[0] not in EXPERIMENTS:
        raise PersonaError(
            f"The run in {str(directory)!r} was not started by a command, so none can be run again."
        )
    if TRUST in origin.argv and not trust_remote_code:
        raise PersonaError(
            f"The run in {str(directory)!r} was started with {TRUST}, so it executes code that "
            f"comes with its checkpoint; if you trust that code, add {TRUST}."
        )
    again = [*origin.argv, "--resume", str(target)]
    if origin.date is not None:
        again.append(f"--date={origin.date}")
    if journal.backend == BACKEND:
        host = Ledger.of(journal).host
        _confirm(host, ndif_host)
        again += ["--ndif-host", host, "--detach" if detach else "--no-detach"]
    elif detach or ndif_host is not None:
        option = "--detach" if detach else "--ndif-host"
        raise PersonaError(
            f"{option} is for jobs on a server, and the run in {str(directory)!r} has none; leave "
            "it out."
        )
    try:
        os.chdir(origin.cwd)
    except OSError as error:
        raise PersonaError(
            f"The run was started in {origin.cwd!r}, which cannot be entered ({error.strerror}); "
            "paths on its command line are relative to it, so put it back."
        ) from error
    if notes.is_terminal:
        words = plain(f"persona {shlex.join(origin.argv)}")
        notes.print(words, style="dim", soft_wrap=True)
    command = context.find_root().command
    code = command.main(again, prog_name="persona", standalone_mode=False)
    raise typer.Exit(code if isinstance(code, int) else 0)


def _confirm(host: str, given: str | None) -> None:
    """Refuse a server that only the directory names: a run of somebody else could name any.

    One of this machine, too, where other users can listen.

    Raises:
        PersonaError: says how to confirm it.
    """
    from nnsight import CONFIG

    if host in (given if given is None else given.rstrip("/"), CONFIG.API.HOST.rstrip("/")):
        return
    raise PersonaError(
        f"The jobs are with {host}, which is not the server that nnsight is configured for; if you "
        f"trust it with your API key, add --ndif-host {shlex.quote(host)}."
    )
