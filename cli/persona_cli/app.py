"""The `persona` application: its commands, and how errors leave it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Annotated, Any

import typer

from persona_cli.command_line import typed
from persona_cli.commands import (
    doctor,
    grids,
    jobs,
    models,
    report,
    reproduce,
    resume,
    vectors,
)
from persona_cli.console import complain, lasting_streams, say
from persona_cli.option_groups import expand_groups
from persona_nnsight.errors import PersonaError, quoted
from persona_nnsight.experiments.registry import NAMES
from persona_nnsight.storage.run_directory import release_unused

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
for _command in (
    *(getattr(import_module(f"persona_cli.commands.{name}"), name) for name in NAMES),
    reproduce.reproduce,
    report.report,
    vectors.vectors,
    jobs.jobs,
    resume.resume,
    doctor.doctor,
):
    app.command(_command.__name__)(expand_groups(_command))
app.add_typer(grids.app, name="grids")
app.add_typer(models.app, name="models")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"persona-nnsight {version('persona-nnsight')}")
        raise typer.Exit


@app.callback()
def persona(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """How a language model combines who it is asked to be with what it is asked to do.

    A role prompt is "As {persona}, {task}". **capture** records what persona and task each do to
    the residual stream, **substitute** replaces one residual by the sum of the two effects and
    measures what changes, **inject** tries to give a persona to a prompt that does not name it.
    **markers** looks for the persona in generated text, **steer** writes the effects in other
    proportions, **reproduce** makes the paper's tables and figure, and **report** a page of a run.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input is one sentence on standard error and exit code 2.

    Output that cannot be written is one, too, with exit code 1, after the work is done and saved.
    """
    # Read by torch when it first allocates: large tensors in large pages, where the system leaves
    # the choice to programs (Linux), save a tenth of a run's time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    words = sys.argv[1:] if arguments is None else arguments
    typed.set(tuple(words))
    with lasting_streams() as lost:
        try:
            code = _run(arguments, words)
        finally:
            release_unused()
        if (reason := lost()) is not None:
            complain(
                f"Standard output cannot be written ({reason.strerror}); what the command saves is "
                "saved, and what it says is lost."
            )
            code = code or 1
    sys.exit(code)


def _run(arguments: list[str] | None, words: Sequence[str]) -> int:
    """Run the command line, and return its exit code."""
    try:
        return app(arguments, prog_name="persona", standalone_mode=False) or 0
    except PersonaError as error:
        complain(error)
        return 2
    except _UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # then the help was shown
            complain(_usage(error, words))
        return 2
    except typer.Abort:
        return 1


#: What a command line that does not fit the options raises; Typer does not export its name.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]


def _usage(error: Any, words: Sequence[str]) -> str:
    """What is wrong with the words typed, as one sentence."""
    message = " ".join(error.format_message().split()).rstrip(".")
    given = _value_of(getattr(getattr(error, "param", None), "opts", ()), words)
    context = getattr(error, "ctx", None)
    command = "persona" if context is None else context.command_path
    return (
        f"{message}{'' if given is None else f' (given: {quoted(given)})'}; see `{command} --help`."
    )


def _value_of(names: Sequence[str], words: Sequence[str]) -> str | None:
    """The value typed last for an option, which Typer's messages leave out."""
    found = None
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in names:
            found = value if equals else following
    return found
