"""What is done to a run of a prompt, as plain data that answers for itself.

Whoever lays out, costs, batches or tabulates runs asks an intervention these questions, and not of
which kind it is. How each kind acts on a forward pass is the engine's (`engine.acts`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from persona_nnsight.method.conditions import READS, STEER
from persona_nnsight.method.sites import NO_LAYERS, format_layers, format_positions


@dataclass(frozen=True)
class Intervention:
    """What all kinds have in common: nothing is touched, unless a kind says so.

    Attributes:
        kind: the name under which its data is read again (`KINDS`).
        condition: its name in tables.
        positions: where it is in the sequence, in order; the window of a KL follows the first.
    """

    kind: str = field(init=False)
    condition: str
    positions: tuple[str, ...]

    @property
    def anchor(self) -> str:
        """The position that the window of a KL follows."""
        return self.positions[0]

    @property
    def first(self) -> str:
        """The position of the first token that is touched: those before are as in the host."""
        return self.anchor

    @property
    def lowest_layer(self) -> int | None:
        """The lowest layer that is touched: those below are as in the host; None for no layer."""
        return None

    @property
    def reads(self) -> tuple[str, ...]:
        """The prompts, beside the host, that something is taken from."""
        return ()

    @property
    def needs_groups(self) -> bool:
        """Whether it has to know which tokens are the persona's and the task's."""
        return False

    @property
    def batch_key(self) -> Hashable:
        """What those that are scored in one batch share."""
        return self.kind, self.positions

    @property
    def columns(self) -> dict[str, Any]:
        """What tables say of it, by column (`persona_nnsight.analysis.columns`)."""
        return {
            "condition": self.condition,
            "position": format_positions(self.positions),
            "layers": NO_LAYERS,
        }


@dataclass(frozen=True)
class Unedited(Intervention):
    """The host as it is; its positions are those of the edits that it is set against."""

    kind: str = field(default="unedited", init=False)


@dataclass(frozen=True)
class Write(Intervention):
    """Residuals are overwritten, in one run at all positions and layers, each with its own vector.

    Attributes:
        condition: which vector is written (`persona_nnsight.method.edit_vectors`).
        layers: at least one.
        alpha, beta: factors of Δ_X and Δ_Y, for condition ``steer``.
    """

    kind: str = field(default="write", init=False)
    layers: tuple[int, ...]
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def lowest_layer(self) -> int:
        """See `Intervention`."""
        return min(self.layers)

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Intervention`."""
        return READS[self.condition]

    @property
    def batch_key(self) -> Hashable:
        """See `Intervention`."""
        return self.kind, self.positions, self.layers

    @property
    def columns(self) -> dict[str, Any]:
        """See `Intervention`; the factors belong to a steering alone."""
        factors = {"alpha": self.alpha, "beta": self.beta} if self.condition == STEER else {}
        return {**super().columns, "layers": format_layers(self.layers), **factors}


#: All kinds of intervention, by the names in their data; nothing else is read.
KINDS: dict[str, Callable[..., Intervention]] = {"unedited": Unedited, "write": Write}
