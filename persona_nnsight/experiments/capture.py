"""capture: what persona and task do to the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    import pandas as pd

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
            **sites_of(model, self.layers, self.positions),
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
        """How well the effects add up, and what the norm takes."""
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
    medians = table.groupby(["position", "layer"], sort=False)[["cos_xy_sum", "inter_over_xy"]]
    cosines, rest = medians.median()["cos_xy_sum"], medians.median()["inter_over_xy"]
    yield (
        f"cos(Δ_XY, Δ_X+Δ_Y) is {cosines.min():.2f} to {cosines.max():.2f} (1 where the effects "
        f"add up in direction), and ‖Inter‖ is {100 * rest.min():.0f} to {100 * rest.max():.0f} % "
        "of ‖Δ_XY‖."
    )
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
