"""What was typed, for commands that leave work to be gone on with."""

from __future__ import annotations

from contextvars import ContextVar

#: The arguments after ``persona``.
typed: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
