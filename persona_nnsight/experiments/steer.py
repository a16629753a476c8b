"""steer: the persona's and the task's effects written in other proportions than one to one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.arguments import (
    STEERING,
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
from persona_nnsight.experiments.setup import floors, sites_of
from persona_nnsight.method.conditions import HOST, STEER
from persona_nnsight.method.sites import EDITED_DEPTH
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
    from persona_nnsight.storage.vectors import Vectors

HOSTS = ("xy", "by")

Factors = str | float | Iterable[float]

_SWEEP = re.compile(r"(-?[\d.]+):(-?[\d.]+):([\d.]+)")
#: More factors than this in one sweep are a typing error.
_MOST = 200


@dataclass(frozen=True, kw_only=True)
class Steer(KlExperiment):
    """Write h_BB + α·Δ_X + β·Δ_Y and measure KL and text against α and β.

    All of `layers` and `positions` are written in one run, each site with its own vector; the KL
    window begins after the first of the positions. α = β = 1 is the additive vector, α = 0, β = 1
    the task alone, α = β = 0 the baseline.

    Attributes:
        layers, positions: where to write; see `capture`.
        window: tokens per KL.
        alpha, beta: factors of Δ_X and Δ_Y; every pair is a run (`parse_factors`).
        host: what is run: ``xy``, the prompt with its persona, or ``by``, the prompt without it.
        vectors: Δ_X from an earlier run, or the file that holds them, in place of this grid's own:
            with host ``by`` the paper's cached case. Prompts are dated as theirs were.
        margin: differences up to this share of the KL of ``bb``, or of the host, do not matter.
        generate: also write this many tokens of greedy text per run.
    """

    name = "steer"
    title = "Steering"

    layers: Layers = layers_argument(EDITED_DEPTH)
    positions: Positions = positions_argument("p_last")
    window: int = window_argument()
    alpha: Factors = argument(
        "0:2:0.5",
        "Factors of Δ_X: 1, 0,0.5,2, or 0:2:0.5 (from, to, step).",
        group=STEERING,
        metavar="FACTORS",
    )
    beta: Factors = argument("1", "Factors of Δ_Y.", group=STEERING, metavar="FACTORS")
    host: str = argument(
        "xy",
        "What is run: the prompt with its persona, or the one without.",
        group=STEERING,
        metavar="xy|by",
    )
    vectors: Vectors | Path | None = argument(
        None,
        "Take Δ_X from saved vectors instead of measuring it.",
        group=STEERING,
        type=Path,
        metavar="FILE",
        shown=False,
    )
    margin: float = margin_argument()
    generate: int = generate_argument()

    def plan(self, model: Model, grid: Grid) -> Plan:
        """What will be done; see `Experiment`."""
        self.check_margin()
        if self.host not in HOSTS:
            raise PersonaError(
                f"Host {self.host!r} does not exist; use xy (the prompt with its persona) or by "
                "(the prompt without it)."
            )
        vectors = None if self.vectors is None else _loaded(self.vectors)
        measured_on = None if vectors is None else vectors.date
        rendering = rendering_of(model.tokenizer, self.date, measured_on)
        sites = sites_of(model, self.layers, self.positions, rendering)
        at, together = sites["positions"], sites["layers"]
        given = None
        if vectors is not None:
            vectors.check(
                model_id=model.weights.model_id,
                model_sha256=model.weights.sha256,
                n_layers=model.tree.n_layers,
                d_model=model.tree.d_model,
                grid=grid,
                layers=together,
                positions=at,
                date=rendering.date,
            )
            given = vectors.given_x(grid.persona_keys, at, together)
        common: dict[str, Any] = {"host": self.host.upper(), "generate": self.generate}
        control = Unedited(HOST, at) if self.host == "by" else Write("bb", at, together)
        steered = [
            Edit(Write(STEER, at, together, alpha=a, beta=b), **common)
            for b in parse_factors(self.beta, "--beta")
            for a in parse_factors(self.alpha, "--alpha")
        ]
        beside = floors(model, self.host.upper(), at, together)
        edits = [Edit(control, **common), *steered, *beside]
        return self.planned(model, grid, sites, edits, given_x=given)

    @staticmethod
    def sentences(tables: Mapping[str, pd.DataFrame]) -> Iterable[str]:
        """What the factors do, and which is best."""
        return _steering(tables["summary"], tables["contrasts"], tables.get("kl"))

    @staticmethod
    def sections(run: Run) -> list[Section]:
        """KL and texts with a marker by α."""
        from persona_nnsight.pages import run_sections
        from persona_nnsight.pages.figures.steer import steering_curves

        figures = [
            steering_curves(summary, run.tables.get("markers"))
            for summary in run_sections.summaries(run)
        ]
        question = "What do other strengths of the two effects do?"
        return run_sections.kl_sections(run, question, figures)


steer = function_of(Steer)


def _loaded(vectors: Vectors | Path) -> Vectors:
    from persona_nnsight.storage.vectors import Vectors

    return vectors if isinstance(vectors, Vectors) else Vectors.load(vectors)


def parse_factors(factors: Factors, name: str) -> tuple[float, ...]:
    """The factors that an expression names, in its order and without repeats.

    Args:
        factors: ``1``, ``0,0.5,2``, ``0:2:0.5`` (from, to, step; both ends included), several of
            these with commas, or the numbers themselves.
        name: what they are called in errors, such as ``--alpha``.

    Raises:
        PersonaError: an unreadable expression, a number that is not finite, or too many.
    """
    if isinstance(factors, str):
        found = [value for term in factors.split(",") for value in _factor_term(term, name)]
    else:
        try:
            found = [float(f) for f in ([factors] if isinstance(factors, int | float) else factors)]
        except (TypeError, ValueError, OverflowError):
            found = []
    if not found or not all(map(math.isfinite, found)):
        raise PersonaError(f"{name} is {factors!r}; {_ALLOWED_FACTORS}.")
    return tuple(dict.fromkeys(found))


_ALLOWED_FACTORS = "write numbers as '1', '0,0.5,2' or '0:2:0.5' (from, to, step)"


def _factor_term(term: str, name: str) -> list[float]:
    text = term.strip()
    try:
        if match := _SWEEP.fullmatch(text):
            first, last, step = map(float, match.groups())
            if step <= 0 or last < first or (last - first) / step >= _MOST:
                raise PersonaError(
                    f"{name} {text!r} is no sweep of up to {_MOST} steps; write the lower end "
                    "first and a step above 0, like '0:2:0.5'."
                )
            # The end counts when a whole number of steps reaches it, rounding aside.
            steps = math.floor((last - first) / step + 1e-9)
            return [round(first + i * step, 12) + 0.0 for i in range(steps + 1)]
        return [float(text)]
    except ValueError:
        raise PersonaError(f"{name} {text!r} is not understood; {_ALLOWED_FACTORS}.") from None


def _steering(
    summary: pd.DataFrame, contrasts: pd.DataFrame, kl: pd.DataFrame | None
) -> Iterable[str]:
    from persona_nnsight.analysis.columns import records
    from persona_nnsight.analysis.kl_tables import NO_PERSONA
    from persona_nnsight.analysis.verdicts import EQUIVALENT
    from persona_nnsight.analysis.wording import (
        COSTS,
        best_in_words,
        few_cells,
        listed,
        margin_in_words,
        share_in_words,
        verdict_of,
    )

    share, verb, of = "recovered", "recovers", "of what h_BB loses"
    control, owner = "bb", "h_BB"
    if "gap_closed" in summary:
        share, verb, of = "gap_closed", "closes", "of the gap to the prompt with the persona"
        control, owner = HOST, "the unedited prompt"
    medians = summary.loc[summary["condition"] == control, "median"]
    steered = summary[(summary["condition"] == STEER) & summary["median"].notna()]
    for beta, found in steered.groupby("beta", sort=False):
        rows = sorted(records(found), key=lambda row: float(row["alpha"]))
        ends = [f"{row['median']:.3g} at α = {row['alpha']:g}" for row in (rows[0], rows[-1])]
        between = listed(list(dict.fromkeys(ends)))
        sentence = f"With β = {beta:g} the median KL over cells is {between} nats"
        best = min(rows, key=lambda row: float(row["median"]))
        chosen = len(rows) > 1
        if chosen:
            sentence += f", lowest at α = {best['alpha']:g} ({best['median']:.3g})"
        if not math.isnan(best[share]):
            told = share_in_words(best, share, of, with_interval=not chosen)
            sentence += f"; there the vector {verb} {told}"
            if chosen:
                sentence += best_in_words(kl, best, f"{len(rows)} factors α", lowest_kl=True)
        without = [
            row
            for row in records(contrasts.dropna(subset=["lo"]))
            if (row["control"], row["alpha"], row["beta"]) == (NO_PERSONA, best["alpha"], beta)
        ]
        for row in without:
            verdict = verdict_of(row)
            if verdict in COSTS:
                sentence += f"; it {COSTS[verdict]} leaving Δ_X out (α = 0)"
                if verdict == EQUIVALENT:
                    sentence += margin_in_words(row, medians.max(), owner)
                sentence += " (by the median paired difference)"
        yield sentence + "."
    yield from few_cells(summary)
