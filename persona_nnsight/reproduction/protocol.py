"""What the paper ran, table by table (docs/method.md §10), laid out for any model.

========  ======================================================================================
table1    `substitute` on the short grid at four positions and five depths
table2    `substitute` on the long grid at p_last, g1 and g2 and three depths
table3    `markers` on the review cells of the long grid: 80 tokens, one layer
table4    `inject` on the same cells: one layer, and sets of layers around it
figure1   tables 1 and 2 as KL against layer
========  ======================================================================================

Layers are the paper's own on its three models, and at the same depths on any other. Controls are
added to what the paper wrote, because a small KL alone says little.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.execution import Study
from persona_nnsight.experiments.experiment import Experiment
from persona_nnsight.experiments.inject import Inject
from persona_nnsight.experiments.markers import Markers
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.method.sites import DEFAULT_LAYERS, NO_LAYERS, format_layers, parse_layers
from persona_nnsight.models.loading import Model
from persona_nnsight.prompts.chat_template import rendering_of
from persona_nnsight.prompts.encoding import encode_prompt
from persona_nnsight.prompts.grids import Grid
from persona_nnsight.prompts.rendering import Day, Rendering
from persona_nnsight.reproduction.published import paper_model

TABLES = ("table1", "table2", "table3", "table4")
#: What can be asked for, and the tables that it takes.
TARGETS = {**{table: (table,) for table in TABLES}, "figure1": ("table1", "table2")}

#: Tag of the tasks that Tables 3 and 4 take from the long grid.
REVIEW = "review"

#: The paper's additive vector, the controls that stand beside it, and what rounding makes.
CONDITIONS = ("additive", "bb", "by", "other_x", "clean")

#: Three of the five depths of Table 1; the second model was run at other ones.
_TABLE2_LAYERS = {None: "40%,55%,70%", "Qwen/Qwen2.5-1.5B-Instruct": "7,15,20"}

#: Layers of Tables 3 and 4, on the paper's first model, which has 26.
_PAPER_LAYERS = 26
_EDITED = 14
_SETS = (
    (14,),
    (10, 12, 14),
    tuple(range(10, 19, 2)),
    tuple(range(10, 23, 2)),
    tuple(range(6, 23, 2)),
)

#: The paper's own review tasks, whose file has no tags.
_PAPER_REVIEWS = ("arch", "plan", "proposal")

#: SHA-256 of the texts of the paper's cells, by table (see `has_paper_stimuli`).
_STIMULI = {
    "table1": "0034bacfc335a61f724591a0fbb431104c667d56731f33f97800e11d0188a935",
    "table2": "6ec53ec3835c69d7b2d9e6dfdbbfe1162cdec129b424dd27864e8f4deb8448df",
    "table3": "0c0ebed5b77d7f6522280f9e9942d4ff4678f00758e8e3f57cf950f2463eda27",
    "table4": "0c0ebed5b77d7f6522280f9e9942d4ff4678f00758e8e3f57cf950f2463eda27",
}


@dataclass(frozen=True)
class PaperTable(Study[Any]):
    """One table of `TABLES` by name, and the study that makes it."""

    name: str


def parse_targets(only: str | Iterable[str] | None) -> tuple[str, ...]:
    """The tables that an expression such as ``table1,figure1`` takes, in order; None for all.

    Raises:
        PersonaError: a name that is not in `TARGETS`, or none at all.
    """
    if only is None:
        return TABLES
    names = [name.strip() for name in (only.split(",") if isinstance(only, str) else only)]
    for name in names or [""]:
        if name not in TARGETS:
            raise PersonaError(
                f"--only {name!r} is nothing of the paper's; use {', '.join(TARGETS)}, with commas "
                "between them."
            )
    asked = {table for name in names for table in TARGETS[name]}
    return tuple(table for table in TABLES if table in asked)


def plan_table(
    table: str, model: Model, short: Grid, long: Grid, date: Day | None = None
) -> PaperTable:
    """Lay out one table for a model.

    Args:
        table: one of `TABLES`.
        model: with or without weights.
        short, long: the two grids; Tables 3 and 4 take the tasks of `long` that are tagged
            ``review``.
        date: the day that goes into prompts, as for every experiment.

    Raises:
        PersonaError: the long grid has no review tasks or no markers, or a prompt is too long.
    """
    grid = {"table1": short, "table2": long}.get(table) or _reviews(long)
    experiment = _experiment(table, model, grid, rendering_of(model.tokenizer, date))
    return PaperTable(experiment, grid, experiment.plan(model, grid), table)


def _experiment(table: str, model: Model, grid: Grid, rendering: Rendering) -> Experiment[Any]:
    n_layers, date = model.tree.n_layers, rendering.date
    if table == "table1":
        positions = _table1_positions(model, grid, rendering)
        return Substitute(date=date, positions=positions, conditions=_conditions(grid))
    if table == "table2":
        named = paper_model(model.weights.model_id)
        layers = _TABLE2_LAYERS.get(named, _TABLE2_LAYERS[None])
        return Substitute(date=date, layers=layers, conditions=_conditions(grid))
    if table == "table3":
        return Markers(date=date, layers=edited_layer(n_layers))
    together = "; ".join(",".join(map(str, sets)) for sets in layer_sets(n_layers))
    return Inject(date=date, layers=together)


def edited_layer(n_layers: int) -> int:
    """The layer of Tables 3 and 4: 14 of 26, or as deep in another model."""
    return _as_deep(_EDITED, n_layers)


def layer_sets(n_layers: int) -> tuple[tuple[int, ...], ...]:
    """The layer sets of Table 4, as deep as the paper's."""
    return tuple(tuple(sorted({_as_deep(layer, n_layers) for layer in chosen})) for chosen in _SETS)


def reference_layers(table: str, n_layers: int) -> dict[str, str]:
    """From the layers of the paper's first model in a table to those as deep in another."""
    if table in ("table1", "table2"):
        depths = (DEFAULT_LAYERS if table == "table1" else _TABLE2_LAYERS[None]).split(",")
        pairs = [[parse_layers(depth, n)[0] for n in (_PAPER_LAYERS, n_layers)] for depth in depths]
        return {"": "", **{str(theirs): str(ours) for theirs, ours in pairs}}
    sets = zip(_SETS, layer_sets(n_layers), strict=True)
    same = {"": "", NO_LAYERS: NO_LAYERS}
    return {**same, **{format_layers(theirs): format_layers(ours) for theirs, ours in sets}}


def has_paper_stimuli(grid: Grid, table: str) -> bool:
    """Whether the selected cells of a grid are the paper's cells of a table, text by text."""
    return _digest(grid) == _STIMULI[table]


def _digest(grid: Grid) -> str:
    texts = [
        grid.template,
        grid.baseline_persona,
        grid.baseline_task,
        sorted(persona.text for persona in grid.personas if persona.key in grid.persona_keys),
        sorted(task.text for task in grid.tasks if task.key in grid.task_keys),
    ]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()


def _as_deep(layer: int, n_layers: int) -> int:
    """A layer of the paper's 26 in another model, on the scale of Table 1.

    Table 1's depths of 25, 40, 55, 70 and 85 % are layers 6, 10, 14, 18 and 22 there: four layers
    are 15 %.
    """
    percent = 25 + (layer - 6) * 3.75
    return parse_layers(f"{percent}%", n_layers)[0]


def _conditions(grid: Grid) -> Sequence[str]:
    return [name for name in CONDITIONS if name != "other_x" or len(grid.personas) > 1]


def _reviews(grid: Grid) -> Grid:
    keys = [task.key for task in grid.tasks if REVIEW in task.tags and task.key in grid.task_keys]
    if not keys and has_paper_stimuli(grid, "table2"):
        keys = [key for key in _PAPER_REVIEWS if key in grid.task_keys]
    if not keys:
        raise PersonaError(
            f"Tables 3 and 4 take the tasks tagged {REVIEW!r}, and grid {grid.name!r} has none; "
            f"tag some (tags: [{REVIEW}]), or ask for --only table1,table2."
        )
    return grid.select(tasks=keys)


def _table1_positions(model: Model, grid: Grid, rendering: Rendering) -> Sequence[str]:
    """The paper's four positions, or three where the template has no end of the user turn."""
    prompt = encode_prompt(model.tokenizer, grid.prompt(None, None), rendering)
    return [*(["p_user_last"] if prompt.user_last is not None else []), "p_last", "g1", "g2"]
