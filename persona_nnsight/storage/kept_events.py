"""The events of a plan in a journal: kept as they come, and read back."""

from __future__ import annotations

import time
from collections.abc import Iterator

from persona_nnsight.plan.events import Event, Recorded
from persona_nnsight.plan.packing import pack, unpack
from persona_nnsight.storage.journal import Journal

#: Seconds of finished work that may be lost with a process that is killed.
_INTERVAL = 1.0


class Parts:
    """The events of one plan.

    Args:
        journal: where they are kept; its directory is this process's.
        plan_key: names the plan, and begins the names of its parts.
    """

    def __init__(self, journal: Journal, plan_key: str) -> None:
        self.journal = journal
        self.plan_key = plan_key
        self._waiting: list[Event] = []
        numbers = [name.rpartition("-")[2] for name in journal.parts(f"{plan_key}-")]
        self._kept = 1 + max((int(n) for n in numbers if n.isdecimal()), default=-1)
        self._last = time.monotonic()

    def events(self) -> Iterator[Event]:
        """What was kept, in the order in which it was finished."""
        for number in range(self._kept):
            yield from self._events(number)

    def _events(self, number: int) -> list[Event]:
        """The events of a part; none where it is not there, whole."""
        found = self.journal.find(self._name(number))
        try:
            return [] if found is None else unpack(*found)
        except (ValueError, KeyError, TypeError, RecursionError):
            return []  # a file that was changed by hand

    def _name(self, number: int) -> str:
        return f"{self.plan_key}-{number:06d}"

    def add(self, event: Event) -> Event:
        """Take an event, and from time to time write down those that wait.

        Returns:
            The event; residuals, which may be more than memory holds, as maps of the disk.

        Raises:
            JournalError: they cannot be written.
        """
        self._waiting.append(event)
        if isinstance(event, Recorded) and event.residuals:
            self.flush()
            for kept in self._events(self._kept - 1):
                if isinstance(kept, Recorded):
                    event = kept
            return event
        if time.monotonic() - self._last >= _INTERVAL:
            self.flush()
        return event

    def flush(self) -> None:
        """Write down what waits, as one part.

        Raises:
            JournalError: it cannot be written.
        """
        if self._waiting:
            self.journal.keep(self._name(self._kept), *pack(self._waiting))
            self._kept += 1
            self._waiting.clear()
        self._last = time.monotonic()
