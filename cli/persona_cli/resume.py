"""`persona resume`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from persona_nnsight.errors import PersonaError
from persona_nnsight.runs import RUN

#: Commands that leave jobs with a server; a directory can have no other run again.
EXPERIMENTS = ("capture", "substitute", "inject", "markers", "steer", "reproduce")


def resume(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory of a run that is not finished.")
    ],
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Collect what is done, send what is missing, do not wait."),
    ] = False,
    ndif_host: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Confirms the server of a run that is neither nnsight's configured one nor this "
            "machine: the API key is sent there.",
        ),
    ] = None,
) -> None:
    """Go on with a run whose jobs are with an NDIF server.

    What is done is collected, what is missing or was lost is sent, and when everything is here
    the run's tables are written. The command is run again as it was typed, in the directory where
    it was typed; if it would compute something else by now (another grid file, model or version
    of persona), that is refused.

    Example: persona resume outputs/substitute-gemma-2-2b-it-long-1
    """
    from persona_nnsight.backends.ledger import Ledger

    target = directory.absolute()
    if (target / RUN).exists():
        raise PersonaError(f"The run in {str(directory)!r} is finished; nothing is left to do.")
    ledger = Ledger.load(target)
    origin = ledger.origin
    if origin is None or not origin.argv or origin.argv[0] not in EXPERIMENTS:
        raise PersonaError(
            f"The jobs in {str(directory)!r} were not sent by a command, so none can be run again."
        )
    _confirm(ledger.host, ndif_host)
    try:
        os.chdir(origin.cwd)
    except OSError as error:
        raise PersonaError(
            f"The run was started in {origin.cwd!r}, which cannot be entered ({error.strerror}); "
            "paths on its command line are relative to it, so put it back."
        ) from error
    again = [*origin.argv, "--resume", str(target), "--ndif-host", ledger.host]
    again.append("--detach" if detach else "--no-detach")
    command = context.find_root().command
    code = command.main(again, prog_name="persona", standalone_mode=False)
    raise typer.Exit(code if isinstance(code, int) else 0)


def _confirm(host: str, given: str | None) -> None:
    """Refuse a server that only the directory names: a run of somebody else could name any.

    Raises:
        PersonaError: says how to confirm it.
    """
    from nnsight import CONFIG

    from persona_nnsight.backends.server import is_loopback

    if host in (given, CONFIG.API.HOST.rstrip("/")) or is_loopback(host):
        return
    raise PersonaError(
        f"The jobs are with {host}, which is not the server that nnsight is configured for; if you "
        f"trust it with your API key, add --ndif-host {host}."
    )
