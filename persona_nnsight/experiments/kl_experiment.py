"""What experiments have in common whose edits are scored by a KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_nnsight.analysis.columns import KL_FILES
from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.experiment import Experiment
from persona_nnsight.experiments.setup import Sites, checked, clean_text
from persona_nnsight.plan.building import build_plan

if TYPE_CHECKING:
    from persona_nnsight.experiments.results import EditResult
    from persona_nnsight.models.loading import Model
    from persona_nnsight.plan.plan import Edit, Given, Plan
    from persona_nnsight.prompts.grids import Grid


class KlExperiment(Experiment["EditResult"]):
    """An experiment whose edits are scored, and may write texts beside.

    A subclass has these arguments, in the order in which its command lists them.

    Attributes:
        window: tokens per KL.
        margin: differences up to this share of the control's KL do not matter.
        generate: also write this many tokens of greedy text per edit.
    """

    files = KL_FILES

    window: int
    margin: float
    generate: int

    @staticmethod
    def result_type() -> type[EditResult]:
        """KLs."""
        from persona_nnsight.experiments.results import EditResult

        return EditResult

    def check_margin(self) -> None:
        """Refuse a margin that is no share.

        Raises:
            PersonaError: no number of 0 or more.
        """
        margin = self.margin
        known = isinstance(margin, int | float) and not isinstance(margin, bool)
        if not known or not math.isfinite(margin) or margin < 0:
            raise PersonaError(
                f"A margin of {margin!r} is no share of a KL; use 0 (no difference is too small to "
                "matter) or more, such as 0.1 for 10 %."
            )

    def planned(
        self,
        model: Model,
        grid: Grid,
        sites: Sites,
        edits: Sequence[Edit],
        *,
        seed: int = 0,
        given_x: dict[str, Given] | None = None,
    ) -> Plan:
        """The plan of some edits, with the unedited text beside theirs where texts are asked for.

        Raises:
            PersonaError: see `build_plan` and `checked`.
        """
        plan = build_plan(
            self.name,
            model.tokenizer,
            grid,
            **sites,
            window=self.window,
            edits=[*edits, *([clean_text(self.generate)] if self.generate else [])],
            seed=seed,
            given_x=given_x,
        )
        return checked(plan, model)
