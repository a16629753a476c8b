"""substitute: one residual of the role prompt's run is overwritten at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.arguments import (
    Layers,
    Positions,
    argument,
    generate_argument,
    layers_argument,
    margin_argument,
    positions_argument,
    window_argument,
)
from persona_nnsight.experiments.function import function_of
from persona_nnsight.experiments.kl_experiment import KlExperiment
from persona_nnsight.experiments.setup import sites_of
from persona_nnsight.method.conditions import ROUNDED, SUBSTITUTE_CONDITIONS
from persona_nnsight.method.sites import DEFAULT_LAYERS, DEFAULT_POSITIONS
from persona_nnsight.plan.interventions import Write
from persona_nnsight.plan.plan import Edit
from persona_nnsight.prompts.chat_template import rendering_of

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.models.loading import Model
    from persona_nnsight.pages.blocks import Section
    from persona_nnsight.pages.stored_run import Run
    from persona_nnsight.plan.plan import Plan
    from persona_nnsight.prompts.grids import Grid

#: Where the median KL of `bb` is below this, in nats, even the baseline's residual costs little.
NEARLY_FREE = 0.1

_CONTROLS = {"by": "leaving the persona out (by)", "other_x": "another persona's Δ_X (other_x)"}


@dataclass(frozen=True, kw_only=True)
class Substitute(KlExperiment):
    """Overwrite one residual of the XY run, one site at a time, and measure what changes.

    KL is Σ over the `window` tokens after the site of KL(clean ‖ patched), in nats.

    Attributes:
        layers, positions: the sites; see `capture`.
        conditions: which vectors to write, from `SUBSTITUTE_CONDITIONS`; None for all (without
            ``other_x`` when the grid has a single persona, and without ``rounded`` in float32).
            ``clean`` is always among them, and in fewer bits ``rounded``: what is not above these
            is rounding.
        window: tokens per KL.
        generate: also write this many tokens of greedy text per edit.
        seed: of the ``random`` control.
        margin: differences up to this share of the KL of ``bb`` do not matter.
    """

    name = "substitute"
    title = "Substitution"

    layers: Layers = layers_argument(DEFAULT_LAYERS)
    positions: Positions = positions_argument(DEFAULT_POSITIONS)
    conditions: str | Iterable[str] | None = argument(
        None,
        f"What to write, with commas between: {', '.join(SUBSTITUTE_CONDITIONS)}; clean always is.",
        metavar="NAMES",
        shown="all",
    )
    window: int = window_argument()
    seed: int = argument(0, "Seed of the random control.")
    margin: float = margin_argument()
    generate: int = generate_argument()

    def plan(self, model: Model, grid: Grid) -> Plan:
        """What will be done; see `Experiment`."""
        self.check_margin()
        rendering = rendering_of(model.tokenizer, self.date)
        sites = sites_of(model, self.layers, self.positions, rendering)
        edits = [
            Edit(
                Write(condition, (position,), (layer,)),
                generate=0 if condition == "clean" else self.generate,
            )
            for condition in _conditions(self.conditions, grid, rounds=model.rounds)
            for position in sites["positions"]
            for layer in sites["layers"]
        ]
        return self.planned(model, grid, sites, edits, seed=self.seed)

    @staticmethod
    def sentences(tables: Mapping[str, pd.DataFrame]) -> Iterable[str]:
        """What the additive vector recovers, beside its controls."""
        return _substitution(tables["summary"], tables["contrasts"])

    @staticmethod
    def sections(run: Run) -> list[Section]:
        """KL by layer, site, cell, persona and task, and the geometry at the same sites."""
        from persona_nnsight.pages import run_sections
        from persona_nnsight.pages.figures import substitute as drawn

        figures = [
            figure
            for summary, cells in run_sections.summary_and_cells(run)
            for figure in (
                drawn.kl_by_layer(summary),
                drawn.site_maps(summary),
                drawn.cell_dots(summary, cells),
                *drawn.by_persona_and_task(cells),
            )
        ]
        question = "What changes when one residual is overwritten?"
        return [
            *run_sections.kl_sections(run, question, figures),
            *run_sections.geometry_section(run),
        ]


substitute = function_of(Substitute)


def _conditions(conditions: str | Iterable[str] | None, grid: Grid, *, rounds: bool) -> list[str]:
    has_donor = len(grid.personas) > 1
    if conditions is None:
        left_out = {*([] if has_donor else ["other_x"]), *([] if rounds else [ROUNDED])}
        return [name for name in SUBSTITUTE_CONDITIONS if name not in left_out]
    names = conditions.split(",") if isinstance(conditions, str) else conditions
    wanted = list(dict.fromkeys(name.strip() for name in names))
    for name in wanted:
        if name not in SUBSTITUTE_CONDITIONS:
            raise PersonaError(
                f"Condition {name!r} does not exist; use {', '.join(SUBSTITUTE_CONDITIONS)}."
            )
    if not wanted:
        raise PersonaError(f"No condition was named; use {', '.join(SUBSTITUTE_CONDITIONS)}.")
    if "other_x" in wanted and not has_donor:
        raise PersonaError(
            "Condition 'other_x' needs a second persona to take Δ_X from and this grid has one; "
            "use a grid with several, or leave the condition out."
        )
    # Without these nobody knows what is rounding.
    wanted += ["clean", *([ROUNDED] if rounds else [])]
    return [name for name in SUBSTITUTE_CONDITIONS if name in wanted]


def _substitution(summary: pd.DataFrame, contrasts: pd.DataFrame) -> Iterable[str]:
    from persona_nnsight.analysis.wording import few_cells, layers_in_words, shares_in_words

    for position, at in summary.groupby("position", sort=False):
        additive = at[at["condition"] == "additive"].set_index("layers")
        neither = at[at["condition"] == "bb"].set_index("layers")["median"]
        mine = contrasts[
            (contrasts["position"] == position) & (contrasts["condition"] == "additive")
        ]
        clauses = [
            verdict for verdict in (_verdicts(mine, c, neither) for c in _CONTROLS) if verdict
        ]
        if clauses:
            clauses[-1] += " (by medians of paired differences)"
        if "recovered" in additive and additive["recovered"].notna().any():
            shares = shares_in_words(additive, "recovered", "of what writing h_BB loses")
            clauses.insert(0, f"recovers {shares}")
        said = [f"At {position} the additive vector {'; it '.join(clauses)}."] if clauses else []
        free = neither[neither < NEARLY_FREE]
        if len(free):
            where = (
                layers_in_words(free.index)
                if said
                else f"{position}, {layers_in_words(free.index)},"
            )
            said.append(
                f"At {where} a low KL is nearly free: even the median KL of h_BB over cells is at "
                f"most {free.max():.2g} nats."
            )
        if said:
            yield " ".join(said)
    yield from few_cells(summary)


def _verdicts(contrasts: pd.DataFrame, control: str, neither: pd.Series[float]) -> str:
    """How the additive vector compares with a control, layer by layer."""
    from persona_nnsight.analysis.columns import records
    from persona_nnsight.analysis.verdicts import EQUIVALENT
    from persona_nnsight.analysis.wording import (
        COSTS,
        layers_in_words,
        listed,
        margin_in_words,
        verdict_of,
    )

    groups: dict[str, list[str]] = {}
    margin = ""
    for row in records(contrasts[contrasts["control"] == control].dropna(subset=["lo"])):
        verdict = verdict_of(row)
        groups.setdefault(verdict, []).append(row["layers"])
        if verdict == EQUIVALENT:
            margin = margin_in_words(row, neither.get(row["layers"]), "h_BB")
    told = [
        f"{words} {'it' if number else _CONTROLS[control]}"
        f"{margin if verdict == EQUIVALENT else ''} at {layers_in_words(groups[verdict])}"
        for number, (verdict, words) in enumerate(
            (verdict, words) for verdict, words in COSTS.items() if verdict in groups
        )
    ]
    return listed(told) if told else ""
