"""capture: what persona and task do to the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import GEOMETRY_FILES
from persona_nnsight.experiments.arguments import (
    Layers,
    Positions,
    argument,
    layers_argument,
    positions_argument,
)
from persona_nnsight.experiments.experiment import Experiment
from persona_nnsight.experiments.function import function_of
from persona_nnsight.experiments.setup import checked, sites_of
from persona_nnsight.method.sites import DEFAULT_LAYERS, DEFAULT_POSITIONS
from persona_nnsight.plan.building import build_plan
from persona_nnsight.prompts.chat_template import rendering_of

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.analysis.geometry_tables import Change
    from persona_nnsight.experiments.results import CaptureResult
    from persona_nnsight.models.loading import Model
    from persona_nnsight.pages.blocks import Section
    from persona_nnsight.pages.stored_run import Run
    from persona_nnsight.plan.plan import Plan
    from persona_nnsight.prompts.grids import Grid


@dataclass(frozen=True, kw_only=True)
class Capture(Experiment["CaptureResult"]):
    """Record the residuals of BB, XB, BY and XY at every asked site, and how they add up.

    At g1, g2, … all four are teacher-forced on XY's greedy continuation, so positions line up.

    Attributes:
        layers: an expression such as ``4-12`` or ``25%,40%``, or layer numbers.
        positions: names such as ``p_last,g1,g2``.
        window: tokens of XY's continuation that are kept beyond the last position.
    """

    name = "capture"
    title = "Capture"
    files = GEOMETRY_FILES
    told_from = ("geometry",)

    layers: Layers = layers_argument(DEFAULT_LAYERS)
    positions: Positions = positions_argument(DEFAULT_POSITIONS)
    window: int = argument(
        10, "How many tokens of XY's continuation to keep beyond the last position."
    )

    def plan(self, model: Model, grid: Grid) -> Plan:
        """What will be done; see `Experiment`."""
        plan = build_plan(
            self.name,
            model.tokenizer,
            grid,
            **sites_of(
                model, self.layers, self.positions, rendering_of(model.tokenizer, self.date)
            ),
            window=self.window,
            keeps_residuals=True,
        )
        return checked(plan, model)

    @staticmethod
    def result_type() -> type[CaptureResult]:
        """Residuals and their geometry."""
        from persona_nnsight.experiments.results import CaptureResult

        return CaptureResult

    @staticmethod
    def sentences(tables: Mapping[str, pd.DataFrame]) -> Iterable[str]:
        """How close the sum of the effects comes, what Δ_X gains, and what the norm takes."""
        return _geometry(tables["geometry"]) if len(tables["geometry"]) else ()

    @staticmethod
    def sections(run: Run) -> list[Section]:
        """The geometry."""
        from persona_nnsight.pages.run_sections import geometry_section

        return geometry_section(run)


capture = function_of(Capture)


def _geometry(table: pd.DataFrame) -> Iterable[str]:
    import numpy as np

    from persona_nnsight.analysis.resampling import Crossed
    from persona_nnsight.analysis.verdicts import interval

    # Where all prompts are the same so far (p_last at layer 0) there is no effect to speak of.
    if "norm_dxy" in table:
        lengths = table.groupby(["position", "layer"], sort=False)["norm_dxy"]
        table = table[lengths.transform("median") > 0]
    if table["cos_xy_sum"].isna().all():
        return
    yield from _sum_and_controls(table)
    if "inter_over_xy_normed" not in table:
        return
    change = table.assign(change=table["inter_over_xy_normed"] - table["inter_over_xy"])
    wide = change.set_index(["persona", "task", "position", "layer"])["change"]
    sites = wide.unstack(["position", "layer"])
    draws = Crossed(sites.index).medians(sites.to_numpy(dtype=float))
    low_end, high_end = interval(draws)
    if np.isnan(low_end).all():
        return
    smaller, larger = int((high_end < 0).sum()), int((low_end > 0).sum())
    yield (
        "The layer's input norm, which the paper supposes to absorb part of Inter, makes "
        f"‖Inter‖/‖Δ_XY‖ smaller at {smaller} of {sites.shape[1]} sites and larger at {larger} "
        f"(median change {sites.median().median():+.3f})."
    )


def _sum_and_controls(table: pd.DataFrame) -> Iterable[str]:
    """How close Δ_X+Δ_Y comes to Δ_XY, and how much of that adding Δ_X to Δ_Y gains."""
    from persona_nnsight.analysis.geometry_tables import RATIOS, change
    from persona_nnsight.analysis.verdicts import HIGHER

    measured = [name for name in RATIOS if name in table and table[name].notna().any()]
    medians = table.groupby(["position", "layer"], sort=False)[measured].median()
    cosine = _span(medians["cos_xy_sum"], "{:.2f}")
    rest = _span(100 * medians["inter_over_xy"], "{:.0f}")
    over = "medians over cells, from the lowest site to the highest"
    gain = change(table, "cos_xy_sum", "cos_xy_y")
    left = change(table, "inter_over_xy", "rest_y")
    if gain is None or left is None:
        yield (
            f"cos(Δ_XY, Δ_X+Δ_Y) is {cosine}, and ‖Inter‖ is {rest} % of ‖Δ_XY‖ ({over}). Without "
            "Δ_Y alone beside it that does not tell whether the effects add up."
        )
        return
    yield (
        f"cos(Δ_XY, Δ_X+Δ_Y) is {cosine}, and cos(Δ_XY, Δ_Y) without Δ_X is "
        f"{_span(medians['cos_xy_y'], '{:.2f}')}; Δ_X+Δ_Y leaves {rest} % of ‖Δ_XY‖, and Δ_Y alone "
        f"{_span(100 * medians['rest_y'], '{:.0f}')} % ({over})."
    )
    said = [
        f"Adding Δ_X to Δ_Y changes the cosine by a median of {_span(gain.medians, '{:+.3f}')}"
        f"{_told(gain)} and what is left by a median of {_span(100 * left.medians, '{:+.1f}')} "
        f"points{_told(left)}."
    ]
    other = change(table, "cos_xy_other", "cos_xy_y")
    against = change(table, "cos_xy_sum", "cos_xy_other")
    if other is not None and against is not None:
        said.append(
            "Adding another persona's Δ_X′, the control, changes the cosine by a median of "
            f"{_span(other.medians, '{:+.3f}')}{_told(other)}; with Δ_X it is above that with Δ_X′ "
            f"by a median of {_span(against.medians, '{:+.3f}')}{_told(against)}."
        )
    if gain.is_told:
        if gain.sites(HIGHER) < len(gain.words):
            said.append(
                "Where adding Δ_X does not raise it, a high cosine with the sum does not show that "
                "the effects add up."
            )
        said.append("Sites are counted by 95 % intervals that hold for all of them at once.")
    yield " ".join(said)


def _span(values: Any, form: str) -> str:
    """``0.12 to 0.34``, or one number where both ends are the same; missing values left out."""
    import numpy as np

    ends = [form.format(end + 0.0) for end in (np.nanmin(values), np.nanmax(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _told(change: Change) -> str:
    """At how many sites the intervals leave out 0; nothing where there are none."""
    from persona_nnsight.analysis.verdicts import HIGHER, LOWER

    if not change.is_told:
        return ""
    up, down, n = change.sites(HIGHER), change.sites(LOWER), len(change.words)
    return f" (up at {up} of {n} sites, down at {down}, undecided at {n - up - down})"
