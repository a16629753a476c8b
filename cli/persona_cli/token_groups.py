"""The prompts of cells as tokens, coloured by the group that each belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from persona_cli.console import note_step, output, plain, spinner
from persona_nnsight.errors import escaped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_nnsight.prompts.grids import Cell, Grid
    from persona_nnsight.prompts.rendering import Rendering
    from persona_nnsight.prompts.role_prompt import RolePrompt

#: Names stand beside the colours, which not every terminal and eye has.
_COLOURS = {
    **{"frame": "bright_black", "persona": "magenta", "task": "cyan"},
    **{"header": "yellow", "answer": "green"},
}
#: Between two tokens.
_BORDER = "│"


def show_tokens(grid: Grid, model: str) -> None:
    """Print the four prompts of every selected cell as a model's tokenizer cuts them.

    Raises:
        PersonaError: no such model, or a tokenizer that does not tell which characters its tokens
            stand for.
    """
    with spinner("Loading the tokenizer") as stop:
        from persona_nnsight.models.loading import load_tokenizer
        from persona_nnsight.prompts.chat_template import rendering_of

        def notify(step: str) -> None:
            stop()  # downloads show progress bars of their own
            note_step(step)

        tokenizer = load_tokenizer(model, notify=notify)
    rendering = rendering_of(tokenizer)
    prompts = [
        (f"{name} of {cell.persona.key}, {cell.task.key}", message)
        for cell in grid.cells
        for name, message in _four(grid, cell).items()
    ]
    # All before any, so that what is refused leaves nothing half printed.
    tables = [(title, _table(tokenizer, message, rendering)) for title, message in prompts]
    console = output()
    for title, table in tables:
        console.print(Text(title, style="bold"))
        console.print(table)
        console.print()


def _four(grid: Grid, cell: Cell) -> dict[str, RolePrompt]:
    return {
        "BB": grid.role_prompt(None, None),
        "XB": grid.role_prompt(cell.persona, None),
        "BY": grid.role_prompt(None, cell.task),
        "XY": grid.role_prompt(cell.persona, cell.task),
    }


def _table(tokenizer: PreTrainedTokenizerBase, message: RolePrompt, rendering: Rendering) -> Table:
    """One line per group: its name, how many tokens it has, and these."""
    from persona_nnsight.prompts.token_groups import encode_grouped, pieces

    prompt = encode_grouped(tokenizer, message, rendering)
    cut = pieces(tokenizer, prompt, rendering)
    groups = prompt.groups
    assert groups is not None
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for name in sorted(_COLOURS, key=lambda name: groups.tokens(name).start):
        tokens = groups.tokens(name)
        shown = Text(_BORDER, style="dim").join(
            Text(escaped(cut[index], keep=""), style=_COLOURS[name]) for index in tokens
        )
        table.add_row(Text(name, style=_COLOURS[name]), plain(len(tokens)), shown)
    return table
