"""Numbers for the terminal."""

from __future__ import annotations

import math


def percent(value: float) -> str:
    """A share for the terminal: ``89 %``, or a dash where there is none."""
    return f"{round(100 * value)} %" if math.isfinite(value) else "-"


def fixed(value: float) -> str:
    """A number for the terminal, to three decimals; a dash where there is none."""
    return f"{round(value, 3) + 0.0:.3f}" if math.isfinite(value) else "-"


def span(low: float, high: float, *, digits: int) -> str:
    """An interval for the terminal: ``0.03 to 0.11``, or a dash where there is none."""
    if not math.isfinite(low):
        return "-"
    return f"{round(low, digits) + 0.0:.{digits}f} to {round(high, digits) + 0.0:.{digits}f}"
