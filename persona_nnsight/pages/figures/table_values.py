"""What figures read off a summary table: layers in order, conditions, finite values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_nnsight.pages.figures.lines import (
    CONTROLS,
    spread,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


#: Rows of a table as plain mappings.
Records = Sequence[Mapping[str, Any]]

KL_LABEL = "KL, nats"


def distinct(rows: Records, name: str) -> list[Any]:
    """The values of a column in the order in which they come."""
    return list(dict.fromkeys(row[name] for row in rows))


def layer_sets(rows: Records) -> list[str]:
    """The layer sets of a table, ascending; ``none`` first."""
    return sorted(distinct(rows, "layers"), key=_layer_order)


def _layer_order(layers: str) -> tuple[list[int], str]:
    return [int(part) for part in layers.split("+") if part.isdigit()], layers


def layer_axis(layers: Sequence[str]) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Where layer sets stand on an axis, and the labels to write: at most eight.

    Single layers stand at their number, sets side by side.
    """
    if all(layer.isdigit() for layer in layers):
        at = {layer: float(layer) for layer in layers}
    else:
        at = {layer: float(i) for i, layer in enumerate(layers)}
    return at, [(at[layers[i]], layers[i]) for i in spread(len(layers), 8)]


def main_condition(rows: Records) -> str:
    """The condition that the figures put in front: the additive vector where it was written."""
    conditions = distinct(rows, "condition")
    candidates = [c for c in conditions if c not in (*CONTROLS, "clean")]
    return "additive" if "additive" in conditions else (candidates or conditions)[0]


def finite(values: Iterable[float]) -> list[float]:
    """The values that are numbers."""
    return [value for value in values if math.isfinite(value)]


def edit_name(row: Mapping[str, Any]) -> str:
    """A short name of an edit: its condition and layers."""
    layers = row.get("layers") or "none"
    return str(row["condition"]) if layers == "none" else f"{row['condition']} L{layers}"
