"""Numbers as the report writes them; a missing one is a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from persona_nnsight.analysis.columns import Unit

MISSING = "–"
_MINUS = "−"

#: How a column of a table writes its numbers.
Format = Callable[[float], str]


def kl(value: float) -> str:
    """A KL in nats: four decimals, or powers of ten where they would show nothing."""
    if math.isfinite(value) and 0 < abs(value) < 5e-5:
        return f"{value:.0e}".replace("-", _MINUS)
    return fixed(value, 4)


def short_kl(value: float) -> str:
    """A KL for the narrow cells of a figure: two or three figures, no leading zero."""
    if not math.isfinite(value):
        return fixed(value, 0)
    if abs(value) < 5e-5:
        return "≈0" if value else "0"
    if abs(value) >= 10:
        return fixed(value, 0)
    if abs(value) >= 1:
        return fixed(value, 2)
    return fixed(value, 3 if abs(value) >= 5e-4 else 4).replace("0.", ".", 1)


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{fixed(100 * value, 0)} %" if math.isfinite(value) else fixed(value, 0)


def fixed(value: float, decimals: int) -> str:
    """A number with so many decimals."""
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else f"{_MINUS}∞"
    text = f"{value:.{decimals}f}"
    if not float(text):
        text = text.removeprefix("-")
    return text.replace("-", _MINUS)


def count(value: float) -> str:
    """A whole number."""
    return fixed(value, 0)


def two_decimals(value: float) -> str:
    """A number with two decimals."""
    return fixed(value, 2)


def plain(value: float) -> str:
    """A number as short as it goes, such as a steering strength."""
    return MISSING if math.isnan(value) else f"{value:g}".replace("-", _MINUS)


#: How numbers of a unit are written, and the ends of their intervals.
FORMATS: Mapping[Unit, tuple[Format, Format]] = {
    "nats": (kl, kl),
    "share": (share, share),
    "count": (count, lambda value: fixed(value, 1)),
    "mean": (two_decimals, two_decimals),
    "factor": (plain, plain),
    "layer": (plain, plain),
    "": (lambda value: fixed(value, 3), lambda value: fixed(value, 3)),
}
