"""What every experiment's plan takes from the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from persona_nnsight.errors import PersonaError
from persona_nnsight.models import Model
from persona_nnsight.plan import Edit, Plan
from persona_nnsight.sites import parse_layers, parse_positions

Layers = str | int | Iterable[int]
Positions = str | Iterable[str]


def sites_of(model: Model, layers: Layers, positions: Positions) -> dict[str, Any]:
    """The arguments of `build_plan` that come from the model and the site expressions."""
    return {
        "layers": parse_layers(layers, model.tree.n_layers),
        "positions": parse_positions(positions),
        "eos_ids": model.eos_ids,
    }


def clean_text(generate: int) -> Edit:
    """The text of the unedited XY prompt."""
    return Edit("clean", ("p_last",), (), scored=False, generate=generate)


def checked(plan: Plan, model: Model, text_option: str = "--generate") -> Plan:
    """Refuse a plan whose longest sequence the model has no positions for.

    `text_option` is what sets the length of its texts.
    """
    longest = max(plan.prompts, key=lambda prompt: len(prompt.ids))
    option = "--window" if plan.reference_tokens >= plan.longest_text else text_option
    tokens = len(longest.ids) + max(plan.reference_tokens, plan.longest_text)
    if tokens > model.tree.max_length:
        raise PersonaError(
            f"The prompt {_shorten(longest.text)!r} and its continuation take {tokens} tokens and "
            f"this model has room for {model.tree.max_length}; use shorter texts or a smaller "
            f"{option}."
        )
    return plan


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
