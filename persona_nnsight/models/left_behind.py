"""What stands in a pickled result where its model had weights and a tokenizer."""

from __future__ import annotations

from typing import Any

from persona_nnsight.errors import PersonaError


class LeftBehind:
    """Refuses whatever is asked of it, but for what Python itself looks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise PersonaError(
            "This model came with a pickled result, which has neither its weights nor its "
            "tokenizer; load it by load_model(...) to run it."
        )
