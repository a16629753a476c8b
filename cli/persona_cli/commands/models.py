"""`persona models`: which models are on this machine, and how to get one."""

from __future__ import annotations

from typing import Annotated

import typer

from persona_cli.console import note_step, output, plain, say

app = typer.Typer(invoke_without_command=True)


@app.callback()
def list_command(context: typer.Context) -> None:
    """List the models on this machine, or fetch one.

    The list holds the embedded model, converted GGUF files and the hub cache. A model need not be
    listed to be used: `--model` also takes a model directory, the path of a .gguf file, or any hub
    id, and fetches or converts what is missing.
    """
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from persona_nnsight.models.weights.model_files import human_size
    from persona_nnsight.models.weights.resolve import list_models

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "kind", "state", "size", "where"):
        right = heading == "size"
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    entries = list_models()
    for entry in entries:
        size = human_size(entry.bytes) if entry.bytes else "-"
        where = str(entry.path) if entry.path else "-"
        table.add_row(*map(plain, (entry.id, entry.kind, entry.state, size, where)))
    console = output()
    console.print(table)
    absent = [entry.id for entry in entries if entry.state == "not fetched"]
    if absent:
        console.print(f"\nFetch with: persona models pull {absent[0]}", style="dim", soft_wrap=True)


@app.command()
def pull(
    name: Annotated[
        str,
        typer.Argument(help="smollm2-135m, a hub id (org/name), or the path of a .gguf file."),
    ],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit hash of a hub model; main if left out."),
    ] = None,
) -> None:
    """Fetch a model, so that runs start at once and work without a network.

    Example: persona models pull smollm2-135m
    """
    from persona_nnsight.models.weights.resolve import resolve

    found = resolve(name, revision=revision, notify=note_step)
    say(f"{name} is ready in {found.path}")
