"""`persona grids`: list, show, check and import grids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from persona_cli.console import output, plain, say, says_all
from persona_cli.options import DEFAULT_MODEL, names
from persona_cli.token_groups import show_tokens
from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    from persona_nnsight.prompts.grids import Grid

app = typer.Typer()


@app.callback(invoke_without_command=True)
def grids(ctx: typer.Context) -> None:
    """The personas and tasks to measure: built-in grids, and your own as YAML files.

    A grid crosses personas ("Yoda") with tasks ("Write a haiku ..."). Each
    pair is a cell; its prompt is "As Yoda, Write a haiku ...".

    Without a command, this lists the built-in grids. To make your own, save
    what `show short --yaml` prints, edit it, and `check` it.
    """
    if ctx.invoked_subcommand is None:
        list_grids()


@app.command("list")
def list_grids() -> None:
    """List the built-in grids and their sizes.

    Where a grid is asked for, give one of these names or a YAML file's path.
    """
    from persona_nnsight.prompts.grids import Grid

    table = _table("grid", "personas", "tasks", "cells", numbers=3)
    for name in Grid.builtin_names():
        grid = Grid.load(name)
        table.add_row(name, str(len(grid.personas)), str(len(grid.tasks)), str(len(grid.cells)))
    output().print(table)


@app.command()
def show(
    grid: Annotated[
        str,
        typer.Argument(metavar="NAME|FILE", help="A built-in grid, or the path of a YAML file."),
    ],
    yaml: Annotated[
        bool, typer.Option("--yaml", help="Print the YAML, to start a grid of your own from.")
    ] = False,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens",
            help="Print the four prompts of a cell as tokens, by the groups they belong to.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="With --tokens: whose tokens; only the tokenizer is loaded.",
            show_default=DEFAULT_MODEL,
        ),
    ] = None,
    personas: Annotated[
        str | None,
        typer.Option(
            metavar="KEYS",
            help="With --tokens: these personas, with commas between them.",
            show_default="the first",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="KEYS", help="With --tokens: these tasks.", show_default="the first"),
    ] = None,
) -> None:
    """Show the personas, tasks, baselines and markers of a grid.

    Markers are words that give a persona away in a generated text. One with
    a space or a hyphen counts anywhere in the text, any other only as a
    whole word.

    With --tokens, each line is a group of tokens: the frame before persona
    and task, these two (what stands between them goes with the later one),
    the header after them, and the last token, where the answer begins.
    """
    from persona_nnsight.prompts.grids import Grid

    _check_options(yaml, tokens, {"--model": model, "--personas": personas, "--tasks": tasks})
    loaded = Grid.load(grid)
    if tokens:
        chosen = loaded.select(
            names(personas) or list(loaded.persona_keys[:1]),
            names(tasks) or list(loaded.task_keys[:1]),
        )
        show_tokens(chosen, DEFAULT_MODEL if model is None else model)
        return
    if yaml:
        say(loaded.to_yaml(ascii_only=not says_all()), end="")
        return
    # User text goes in as Text, in which [brackets] and :colons: mean nothing.
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold", no_wrap=True)
    head.add_column(overflow="fold")
    for label, text in (
        ("grid", f"{loaded.name}, {_size(loaded)}"),
        ("template", loaded.template),
        ("baseline persona", loaded.baseline_persona),
        ("baseline task", loaded.baseline_task),
    ):
        head.add_row(label, plain(text))
    of_personas = _texts(
        "persona", "markers", [(p.key, p.text, p.markers) for p in loaded.personas]
    )
    of_tasks = _texts("task", "tags", [(t.key, t.text, t.tags) for t in loaded.tasks])
    console = output()
    for table in (head, of_personas, of_tasks):
        console.print(table)
        console.print()


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file of a grid.")],
) -> None:
    """Check that a YAML file is a grid, and say how large it is.

    Finds missing and misspelt fields, empty texts, keys given twice and the
    like, without loading a model.
    """
    from persona_nnsight.prompts.grids import Grid

    grid = Grid.load(file)
    say(f"ok: {grid.name}, {_size(grid)}")


@app.command("import")
def import_script(
    script: Annotated[
        Path,
        typer.Argument(
            metavar="SCRIPT.py",
            help="A Python file that assigns dictionaries such as PERSONAS and TASKS.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the grid to this new YAML file instead of printing it.",
        ),
    ] = None,
) -> None:
    """Turn the personas and tasks of a Python script into a YAML grid.

    The script is read, never run. Taken from its top level are the
    dictionaries whose names contain "persona", "task" and "marker", and the
    strings whose names contain "base" and "persona" or "task". Look the
    result over before you measure with it.
    """
    from persona_nnsight.prompts.grid_import import grid_from_script
    from persona_nnsight.storage.files import check_new, write_new

    grid = grid_from_script(script)
    if out is None:
        say(grid.to_yaml(ascii_only=not says_all()), end="")
        return
    check_new(out)
    text = grid.to_yaml()
    write_new(out, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))
    say(f"wrote {out}: {grid.name}, {_size(grid)}")


def _check_options(yaml: bool, tokens: bool, of_tokens: Mapping[str, str | None]) -> None:
    """Refuse options that would have no effect."""
    if yaml and tokens:
        raise PersonaError("--yaml prints a file and --tokens prints prompts; use one of them.")
    for option, value in of_tokens.items():
        if value is not None and not tokens:
            raise PersonaError(f"{option} is for tokens; add --tokens, or leave it out.")


def _size(grid: "Grid") -> str:
    parts = (len(grid.personas), "persona"), (len(grid.tasks), "task"), (len(grid.cells), "cell")
    personas, tasks, cells = (f"{n} {noun}{'' if n == 1 else 's'}" for n, noun in parts)
    return f"{personas} x {tasks} = {cells}"


def _texts(kind: str, extra: str, rows: Sequence[tuple[str, str, tuple[str, ...]]]) -> Table:
    """Make a table of texts, without the extra column if nothing has one."""
    with_extra = any(words for _, _, words in rows)
    table = _table(kind, "text", *([extra] if with_extra else []))
    for key, text, words in rows:
        table.add_row(plain(key), plain(text), *([plain(", ".join(words))] if with_extra else []))
    return table


def _table(first: str, *others: str, numbers: int = 0) -> Table:
    """Make a plain table whose last `numbers` columns are right-aligned."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True, style="cyan")
    for i, name in enumerate(others):
        right = i >= len(others) - numbers
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table
