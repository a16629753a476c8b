"""Which way rows take through the engine, and why."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from persona_nnsight.models.paths import AUTO, FAST, WHOLE

if TYPE_CHECKING:
    from persona_nnsight.models.module_tree import ModuleTree
    from persona_nnsight.plan.plan import Plan

#: Why hybrids take whole rows.
KEEPS_STATES = "the model keeps more than keys and values between tokens"
#: And the checkpoint's own decoding.
DECODING = "the checkpoint's decoding settings would take padding for text"


@dataclass(frozen=True)
class RunPath:
    """How rows go through the engine.

    Attributes:
        name: ``fast`` or ``whole``.
        why: in a few words.
        excess: how far residuals and logits of the fast path are from those of plain forwards, in
            units of what rounding may make: above 1 they are others. None where none were compared.
        deepest: of the fast path, the highest layer at which an edited run may begin, with what
            lies below skipped.
        keeps_cache: of the whole-row path, whether decoding keeps the model's own cache between
            tokens; without it every token is a forward of all before it.
        causal: of the whole-row path, whether a token's residual is the same whatever follows. It
            is not where positions are scaled by the length of the row.
    """

    name: str = FAST
    why: str = "not measured"
    excess: float | None = None
    deepest: int = sys.maxsize
    keeps_cache: bool = True
    causal: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole-row path."""
        return self.name == WHOLE

    def to_data(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        data = asdict(self)
        for name in ("keeps_cache", "causal") if self.name == FAST else ("deepest",):
            del data[name]
        if self.deepest == sys.maxsize:
            data.pop("deepest", None)
        return data


#: The fast path, where nothing was asked or measured.
NOT_MEASURED = RunPath()


def expected_path(tree: ModuleTree, plan: Plan) -> RunPath:
    """The path of a plan whose model has no weights here, as far as its configuration tells."""
    if plan.path != AUTO:
        return RunPath(plan.path, "asked for")
    if plan.decoding:
        return RunPath(WHOLE, DECODING)
    if tree.keeps_states:
        return RunPath(WHOLE, KEEPS_STATES)
    return RunPath(why="if the model's weights agree")
