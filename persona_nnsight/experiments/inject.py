"""inject: the persona's residual is written into the prompt without the persona."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_nnsight.experiments.arguments import (
    Layers,
    argument,
    generate_argument,
    margin_argument,
    window_argument,
)
from persona_nnsight.experiments.function import function_of
from persona_nnsight.experiments.kl_experiment import KlExperiment
from persona_nnsight.experiments.setup import floors, sites_of
from persona_nnsight.method.conditions import HOST, INJECT_CONDITIONS
from persona_nnsight.method.sites import DEFAULT_LAYERS, parse_layer_sets
from persona_nnsight.plan.interventions import Unedited, Write
from persona_nnsight.plan.plan import Edit
from persona_nnsight.prompts.chat_template import rendering_of

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.models.loading import Model
    from persona_nnsight.pages.blocks import Section
    from persona_nnsight.pages.stored_run import Run
    from persona_nnsight.plan.plan import Plan
    from persona_nnsight.prompts.grids import Grid


@dataclass(frozen=True, kw_only=True)
class Inject(KlExperiment):
    """Write the persona's residual into the prompt without the persona, at its last token.

    The host is BY. All layers of a set are written in one run, each with its own vector; every run
    is scored on XY's clean continuation, KL(clean XY ‖ host run).

    Attributes:
        layers: the layers that are written together, or several such sets: ``14; 10-18:2``.
        each: add a run for every layer alone.
        window: tokens per KL.
        margin: differences up to this share of the host's KL do not matter.
        generate: also write this many tokens of greedy text per edit.
    """

    name = "inject"
    title = "Injection"

    layers: Layers = argument(
        DEFAULT_LAYERS,
        "Layers that are written together: 8, 4-12, 4-20:4, 25%,40%, or all; several sets with "
        "semicolons: '14; 10-18:2'.",
        *("--layers", "-l"),
    )
    each: bool = argument(False, "Also write every layer alone.", "--each")
    window: int = window_argument()
    margin: float = margin_argument()
    generate: int = generate_argument()

    def plan(self, model: Model, grid: Grid) -> Plan:
        """What will be done; see `Experiment`."""
        self.check_margin()
        sets = list(parse_layer_sets(self.layers, model.tree.n_layers))
        every = sorted({layer for chosen in sets for layer in chosen})
        if self.each:
            sets += [(layer,) for layer in every if (layer,) not in sets]
        into_host: dict[str, Any] = {"host": "BY", "generate": self.generate}
        edits = [Edit(Unedited(HOST, ("p_last",)), **into_host)]
        edits += [
            Edit(Write(condition, ("p_last",), chosen), **into_host)
            for condition in INJECT_CONDITIONS
            for chosen in sets
        ]
        edits += floors(model, "BY", ("p_last",), tuple(every))
        rendering = rendering_of(model.tokenizer, self.date)
        return self.planned(model, grid, sites_of(model, every, "p_last", rendering), edits)

    @staticmethod
    def sentences(tables: Mapping[str, pd.DataFrame]) -> Iterable[str]:
        """How much of the gap the best set closes."""
        return _injection(tables["summary"], tables["contrasts"], tables.get("kl"))

    @staticmethod
    def sections(run: Run) -> list[Section]:
        """Each set of layers beside the unedited host."""
        from persona_nnsight.pages import run_sections
        from persona_nnsight.pages.figures.inject import injection_bars

        figures = [
            injection_bars(summary, cells) for summary, cells in run_sections.summary_and_cells(run)
        ]
        question = "Can the persona be written into a prompt that does not name it?"
        return run_sections.kl_sections(run, question, figures)


inject = function_of(Inject)


def _injection(
    summary: pd.DataFrame, contrasts: pd.DataFrame, kl: pd.DataFrame | None
) -> Iterable[str]:
    from persona_nnsight.analysis.columns import records
    from persona_nnsight.analysis.wording import (
        best_in_words,
        cells_in_words,
        few_cells,
        share_in_words,
    )

    rows = records(summary)
    host = next((row for row in rows if row["condition"] == HOST), None)
    if host is None:  # a table that was cut by hand
        return
    yield (
        f"The prompt without the persona is {host['median']:.2f} nats from the prompt with it "
        f"(median of {cells_in_words(host['n'])})."
    )
    for condition, what in (
        ("oracle", "Writing the true residual (oracle)"),
        ("cached", "Writing h_BB + Δ_X + Δ_Y (cached)"),
    ):
        written = [
            row
            for row in rows
            if row["condition"] == condition and not math.isnan(row["gap_closed"])
        ]
        if not written:
            continue
        best = max(written, key=lambda row: float(row["gap_closed"]))
        against = next(
            (
                row
                for row in records(contrasts)
                if row["condition"] == condition and row["layers"] == best["layers"]
            ),
            None,
        )
        if against is None:
            continue
        chosen = len(written) > 1
        of_sets = best_in_words(kl, best, f"{len(written)} sets") if chosen else ""
        share = share_in_words(best, "gap_closed", "of the gap in a cell", with_interval=not chosen)
        yield (
            f"{what} closes {share}, at layer {best['layers']}{of_sets}; "
            f"{_compared(against, host['median'])}."
        )
    yield from few_cells(summary)


def _compared(contrast: Mapping[str, Any], host: float) -> str:
    from persona_nnsight.analysis.verdicts import EQUIVALENT, HIGHER, LOWER
    from persona_nnsight.analysis.wording import cells_in_words, margin_in_words, verdict_of

    if math.isnan(contrast["lo"]):
        n = contrast["n"]
        return (
            f"its KL is below the unedited prompt's in {contrast['lower']} of {cells_in_words(n)}"
        )
    verdict = verdict_of(contrast)
    told = {
        LOWER: "its KL is below the unedited prompt's",
        HIGHER: "its KL is above the unedited prompt's",
        EQUIVALENT: "it is as good as the unedited prompt"
        f"{margin_in_words(contrast, host, 'the unedited prompt')}",
    }.get(verdict, "it is undecided whether its KL is below the unedited prompt's")
    return f"{told} (by the median paired difference)"
