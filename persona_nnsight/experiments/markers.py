"""markers: whether generated text still shows the persona (the paper's Table 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import MARKER_FILES
from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.arguments import Layers, argument, layers_argument
from persona_nnsight.experiments.experiment import Experiment
from persona_nnsight.experiments.function import function_of
from persona_nnsight.experiments.setup import checked, clean_text, sites_of
from persona_nnsight.method.conditions import BARE, MARKER_CONDITIONS, TASK_KEY
from persona_nnsight.method.sites import EDITED_DEPTH, NO_LAYERS
from persona_nnsight.plan.building import build_plan
from persona_nnsight.plan.interventions import Unedited, Write
from persona_nnsight.plan.plan import Edit
from persona_nnsight.prompts.chat_template import rendering_of

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.experiments.results import MarkersResult
    from persona_nnsight.models.loading import Model
    from persona_nnsight.pages.blocks import Section
    from persona_nnsight.pages.stored_run import Run
    from persona_nnsight.plan.plan import Plan
    from persona_nnsight.prompts.grids import Grid


@dataclass(frozen=True, kw_only=True)
class Markers(Experiment["MarkersResult"]):
    """Generate text with the persona's effect kept, replaced and taken out, and count markers.

    Greedy text under ``clean`` (XY as it is), ``additive`` and ``remove_x`` (one residual written
    at ``p_last``, at one layer at a time), and ``bare`` (the task alone as the user message). Every
    persona of the grid needs markers.

    Attributes:
        layers: where to write; see `capture`.
        tokens: length of a text, in tokens; shorter where it ends by itself.
    """

    name = "markers"
    title = "Markers"
    files = MARKER_FILES

    layers: Layers = layers_argument(EDITED_DEPTH)
    tokens: int = argument(80, "Length of a text, in tokens.")

    def plan(self, model: Model, grid: Grid) -> Plan:
        """What will be done; see `Experiment`."""
        if self.tokens < 1:
            raise PersonaError(
                f"A text of {self.tokens} tokens holds no marker; use 1 or more (80)."
            )
        chosen = {persona.key: persona for persona in grid.personas}
        without = [key for key in grid.persona_keys if not chosen[key].markers]
        if without:
            raise PersonaError(
                f"The persona {without[0]!r} of grid {grid.name!r} has no markers, so nothing in a "
                "text can be counted for it; give it some (markers: [simmer, mise en place]), or "
                "leave it out."
            )
        rendering = rendering_of(model.tokenizer, self.date)
        sites = sites_of(model, self.layers, "p_last", rendering)
        edits = [clean_text(self.tokens)]
        edits += [
            Edit(Write(condition, ("p_last",), (layer,)), scored=False, generate=self.tokens)
            for condition in ("additive", "remove_x")
            for layer in sites["layers"]
        ]
        bare = Unedited(BARE, ("p_last",))
        edits.append(Edit(bare, host=TASK_KEY, scored=False, generate=self.tokens))
        # No KL is taken, so the shortest clean continuation will do.
        plan = build_plan(self.name, model.tokenizer, grid, **sites, window=1, edits=edits)
        return checked(plan, model, text_option="--tokens")

    @staticmethod
    def result_type() -> type[MarkersResult]:
        """Texts and the markers in them."""
        from persona_nnsight.experiments.results import MarkersResult

        return MarkersResult

    @staticmethod
    def sentences(tables: Mapping[str, pd.DataFrame]) -> Iterable[str]:
        """In how many texts the persona shows, and which conditions differ."""
        return _markers(tables["summary"], tables["contrasts"])

    @staticmethod
    def sections(run: Run) -> list[Section]:
        """How often markers occur."""
        from persona_nnsight.pages import run_sections, table_blocks
        from persona_nnsight.pages.figures.markers import marker_bars

        return run_sections.edit_sections(
            run,
            "Does the text still show the persona?",
            [marker_bars(summary) for summary in run_sections.summaries(run)],
            table_blocks.marker_table,
            table_blocks.marker_contrast_table,
            MARKER_CONDITIONS,
        )


markers = function_of(Markers)


def _markers(summary: pd.DataFrame, contrasts: pd.DataFrame) -> Iterable[str]:
    from persona_nnsight.analysis.columns import records
    from persona_nnsight.analysis.verdicts import HIGHER, LOWER, UNDECIDED
    from persona_nnsight.analysis.wording import few_cells, listed, verdict_of

    n = summary["n"].max()
    counts = []
    for row in records(summary):
        of = "" if row["n"] == n else f" of {row['n']}"  # the run was interrupted
        counts.append(f"{row['any']}{of} under {_edit(row)}")
    yield f"Of {n} texts, a marker of the persona occurs in {listed(counts)}."
    told: dict[str, list[tuple[str, str]]] = {}
    for row in records(contrasts[contrasts["measure"] == "distinct"].dropna(subset=["lo"])):
        told.setdefault(verdict_of(row), []).append((_edit(row), row["control"]))
    for verdict, word in ((LOWER, "fewer"), (HIGHER, "more")):
        if verdict in told:
            pairs = listed([f"{edit} than {control}" for edit, control in told[verdict]])
            yield f"There are {word} distinct markers, in the mean over texts, under {pairs}."
    if UNDECIDED in told:
        pairs = listed([f"{edit} and {control}" for edit, control in told[UNDECIDED]])
        yield (
            f"It is undecided whether the mean number of distinct markers differs between {pairs}."
        )
    yield from few_cells(summary)


def _edit(row: Mapping[str, Any]) -> str:
    """``clean``, or ``additive at 14``."""
    site = "" if row["layers"] == NO_LAYERS else f" at {row['layers']}"
    return f"{row['condition']}{site}"
