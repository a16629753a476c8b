"""`persona resume`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from persona_cli.command_line import typed
from persona_nnsight.errors import PersonaError


def resume(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory of a run that is not finished.")
    ],
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Collect what is done, send what is missing, do not wait."),
    ] = False,
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
    origin = Ledger.load(target).origin
    if origin is None or not origin.argv:
        raise PersonaError(
            f"The jobs in {str(directory)!r} were not sent by a command, so none can be run again."
        )
    try:
        os.chdir(origin.cwd)
    except OSError as error:
        raise PersonaError(
            f"The run was started in {origin.cwd!r}, which cannot be entered ({error.strerror}); "
            "paths on its command line are relative to it, so put it back."
        ) from error
    again = [*origin.argv, "--resume", str(target), "--detach" if detach else "--no-detach"]
    typed.set(origin.argv)
    command = context.find_root().command
    code = command.main(again, prog_name="persona", standalone_mode=False)
    raise typer.Exit(code if isinstance(code, int) else 0)
