"""The ways that rows can take through the engine, by name."""

from __future__ import annotations

#: Shared openings and padded batches; every row whole from its first token; as the model allows.
FAST, WHOLE, AUTO = "fast", "whole", "auto"

#: What can be asked for.
PATHS = (AUTO, FAST, WHOLE)
