"""`persona vectors`: what a file of saved effect vectors holds, and its export for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from persona_cli.console import output, plain, say, titled
from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    from persona_nnsight.storage.vectors import Vectors


def vectors(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A file of saved vectors (.safetensors)."),
    ],
    gguf: Annotated[
        Path | None,
        typer.Option(
            "--gguf",
            metavar="DIR",
            help="Write DIR/PERSONA.gguf, a llama.cpp control vector, for each persona.",
            show_default=False,
        ),
    ] = None,
    personas: Annotated[
        str | None,
        typer.Option(
            metavar="KEYS",
            help="Only these personas of the file, with commas between them.",
            show_default="all",
        ),
    ] = None,
    position: Annotated[
        str | None,
        typer.Option(
            "--position",
            "-p",
            metavar="NAME",
            help="p_last (end of the prompt) or p_user_last (end of the user turn).",
            show_default="p_last where the file has it",
        ),
    ] = None,
) -> None:
    """Show what a file of saved vectors holds, or export it for llama.cpp.

    The table shows ‖Δ_X‖, how far each persona moves the residual at each layer, beside ‖h_BB‖,
    the length of the baseline's residual itself.

    With --gguf, Δ_X at layer L becomes direction L-1 of a control vector: layer L's input is the
    output of the block before it. Layers 0 and 1 cannot be expressed there and are left out. Files
    that exist are not overwritten.

    Example: persona vectors vectors.safetensors --gguf control --personas yoda
    """
    from persona_nnsight.storage.vectors import Vectors

    loaded = Vectors.load(file)
    keys = _chosen(loaded, personas)
    # Positions are in sequence order: p_last is the last one where the file has it.
    at = loaded.positions[-1] if position is None else position
    if at not in loaded.positions:
        raise PersonaError(
            f"--position is {at!r}, but {str(file)!r} holds {' and '.join(loaded.positions)} only; "
            "choose among these."
        )
    if gguf is None:
        _show(loaded, keys, at)
    else:
        _export(loaded, keys, at, gguf)


def _chosen(vectors: Vectors, personas: str | None) -> list[str]:
    """The asked personas in the file's order, or all of them."""
    if personas is None:
        return list(vectors.personas)
    asked = [key.strip() for key in personas.split(",")]
    for key in asked:
        if key not in vectors.personas:
            raise PersonaError(
                f"--personas names {key!r}, which the file does not hold; its personas are "
                f"{', '.join(vectors.personas)}."
            )
    return [key for key in vectors.personas if key in asked]


def _show(vectors: Vectors, keys: list[str], position: str) -> None:
    # User text goes in as Text, in which [brackets] and :colons: mean nothing.
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold", no_wrap=True)
    head.add_column(overflow="fold")
    digest = f", sha256 {vectors.model_sha256[:12]}…" if vectors.model_sha256 else ""
    size = f"{vectors.n_layers} layers, d_model {vectors.d_model}"
    for label, text in (
        ("model", f"{vectors.model_id} ({vectors.architecture}, {size}{digest})"),
        ("template", vectors.template),
        ("baseline persona", vectors.baseline_persona),
        ("baseline task", vectors.baseline_task),
        *([("date in prompts", vectors.date)] if vectors.date else []),
        ("positions", ", ".join(vectors.positions)),
        ("layers", ", ".join(map(str, vectors.layers))),
        ("tasks", ", ".join(vectors.tasks)),
    ):
        head.add_row(label, plain(text))
    texts = _table("persona", "text")
    texts.columns[1].overflow = "fold"
    for key in keys:
        texts.add_row(plain(key), plain(vectors.personas[key]))
    console = output()
    for part in (head, texts, titled(f"‖Δ_X‖ at {position}", _norms(vectors, keys, position))):
        console.print(part)
        console.print()


def _norms(vectors: Vectors, keys: list[str], position: str) -> Table:
    """‖Δ_X‖ by persona and layer; whichever there are fewer of are the columns."""
    row = vectors.positions.index(position)
    effects = {key: vectors.delta_x[key][row] for key in keys}
    lengths = {
        key: [f"{length:.3f}" for length in effect.norm(dim=-1).tolist()]
        for key, effect in {**effects, "‖h_BB‖": vectors.base[row]}.items()
    }
    layers = [str(layer) for layer in vectors.layers]
    if len(layers) <= len(keys):
        table = _table("persona", *(f"layer {layer}" for layer in layers), right=True)
        for key, values in lengths.items():
            table.add_row(plain(key), *values)
    else:
        table = _table("layer", *lengths, right=True)
        for layer, *values in zip(layers, *lengths.values(), strict=True):
            table.add_row(layer, *values)
    return table


def _table(first: str, *others: str, right: bool = False) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True, style="cyan")
    for heading in others:
        table.add_column(heading, justify="right" if right else "left")
    return table


def _export(vectors: Vectors, keys: list[str], position: str, directory: Path) -> None:
    from persona_nnsight.storage.control_vectors import FIRST_LAYER, write_control_vector

    targets = {key: directory / f"{key}.gguf" for key in keys}
    taken = [path for path in targets.values() if path.exists() or path.is_symlink()]
    if taken:
        raise PersonaError(
            f"{str(taken[0])!r} exists already and is not overwritten, so nothing was written; "
            "choose another --gguf directory, or remove it first."
        )
    written = [layer for layer in vectors.layers if layer >= FIRST_LAYER]
    for key, path in targets.items():
        write_control_vector(vectors, key, path, position)
        # Paths are the user's own, and are not to be wrapped.
        say(f"wrote {path}: Δ_X of {key} at {position}")
    say(f"layers: {', '.join(map(str, written))}")
    left_out = [str(layer) for layer in vectors.layers if layer < FIRST_LAYER]
    if left_out:
        say(f"left out: layers {', '.join(left_out)} (no control vector has them)")
    first, block = next(iter(targets.values())), written[len(written) // 2] - 1
    say(
        f"use with llama.cpp: --control-vector-scaled {first}:1.0 --control-vector-layer-range "
        f"{block} {block} adds Δ_X of layer {block + 1} once, at every position; without the range "
        "the layers add up, so use a smaller scale"
    )
