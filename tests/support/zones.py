"""Time zones: the day depends on them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

#: It is always another day in one than in the other: they are 26 hours apart.
EARLY, LATE = "XXX+12", "XXX-14"


@contextmanager
def zone(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """This process in another time zone."""
    if not hasattr(time, "tzset"):
        pytest.skip("the time zone of a process cannot be set here")
    try:
        with monkeypatch.context() as changed:
            changed.setenv("TZ", name)
            time.tzset()
            yield
    finally:
        time.tzset()
