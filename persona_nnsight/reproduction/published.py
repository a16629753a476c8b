"""The paper's figures, to set beside one's own.

Eric Xu, *As X, Do Y: How Persona and Task Combine in Instruction-Tuned LLMs*, arXiv 2605.23147
(2026). ``published.csv`` holds summaries of the outputs that the paper cites, to 5 significant
digits: these still round to what the paper prints (4 would not: it prints 2.8446 as 2.84). The
medians and quartiles of Table 4 were computed from the outputs' per-cell values with numpy's
default, linear quantile, which also gives the quartiles of the other tables. Gemma was run in
float32, Qwen in bfloat16.

========  ========================================================================================
table1    short grid, 12 cells: additive substitution and geometry, 4 positions x 5 layers
table2    long grid, 48 cells: the same at 3 positions x 3 layers; KL by persona and by task too
table3    8 personas x 3 reviews: markers in 80 generated tokens, with and without an edit
table4    the same 24 cells: injection into the host, at one layer and at several
========  ========================================================================================

The long grid of the paper has the keys of the built-in grid ``long``, but other texts.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files

import pandas as pd

from persona_nnsight.analysis.columns import read_table
from persona_nnsight.errors import PersonaError

#: The model that every table has.
REFERENCE_MODEL = "google/gemma-2-2b-it"

#: Hub ids of the models in the paper.
PAPER_MODELS = (REFERENCE_MODEL, "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct")


def published(table: str, model: str) -> pd.DataFrame:
    """The rows of one table for one model; none where the paper has none.

    Columns: ``table``, ``model`` (hub id), ``dtype``; ``position``, ``layers`` and ``condition``
    as in this package's own tables, empty where nothing is written; ``persona`` and ``task``, empty
    for all of them; ``measure``, ``value``, ``q25``, ``q75``, and ``n``, the number of cells.

    =================  ===========================================================================
    measure            value
    =================  ===========================================================================
    ``kl``             median over cells, in nats, summed over the window's 10 tokens
    ``cos_xy_sum``     median over cells of cos(Δ_XY, Δ_X + Δ_Y); no condition
    ``cos_x_y``        median over cells of cos(Δ_X, Δ_Y); no condition
    ``inter_over_xy``  median over cells of ‖Inter‖ / ‖Δ_XY‖; no condition
    ``any``            number of cells with at least one marker; no quartiles
    ``distinct``       mean over cells of the number of distinct markers; no quartiles
    =================  ===========================================================================

    Args:
        table: ``table1`` to ``table4``.
        model: hub id, upper or lower case.

    Raises:
        PersonaError: there is no such table.
    """
    figures = _figures()
    tables = figures["table"].unique().tolist()
    if table not in tables:
        raise PersonaError(f"No figures of {table!r}; the paper's tables are {', '.join(tables)}.")
    chosen = (figures["table"] == table) & (figures["model"] == paper_model(model))
    return figures[chosen].reset_index(drop=True)


def published_dtype(model: str) -> str:
    """The dtype that one of `PAPER_MODELS` was run in for the paper."""
    return str(published("table1", model)["dtype"].iloc[0])


def paper_model(model_id: str) -> str | None:
    """The paper's model that a hub id names, upper or lower case; None if it is another one."""
    return next((known for known in PAPER_MODELS if known.lower() == model_id.lower()), None)


@cache
def _figures() -> pd.DataFrame:
    with as_file(files("persona_nnsight.reproduction") / "published.csv") as path:
        return read_table(path)
