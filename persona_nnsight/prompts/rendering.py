"""What a chat template is told besides the messages: what ``run.json`` records as ``rendering``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime

from persona_nnsight.errors import PersonaError

#: A day, as ``YYYY-MM-DD`` or as Python has it.
Day = str | date


@dataclass(frozen=True)
class Rendering:
    """How prompts are rendered.

    Attributes:
        date: the day that the chat template takes for today, ``YYYY-MM-DD``; None where it writes
            no date, or one that is always the same.
    """

    date: str | None = None


#: Of a template that writes no date.
UNDATED = Rendering()


def parse_day(day: Day, name: str = "--date") -> str:
    """A day as ``YYYY-MM-DD``.

    Args:
        day: what was given.
        name: what it is called in errors.

    Raises:
        PersonaError: no day.
    """
    if isinstance(day, date):
        # A moment is a day too.
        return date(day.year, day.month, day.day).isoformat()
    try:
        return datetime.strptime(day, "%Y-%m-%d").date().isoformat()
    except (TypeError, ValueError):
        raise PersonaError(
            f"{name} is {day!r}, which is no day; write it as YYYY-MM-DD, such as 2024-07-26."
        ) from None
