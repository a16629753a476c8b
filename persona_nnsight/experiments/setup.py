"""What every experiment's plan takes from the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from persona_nnsight.errors import PersonaError, quoted
from persona_nnsight.experiments.arguments import Layers, Positions
from persona_nnsight.method.conditions import ROUNDED
from persona_nnsight.method.sites import parse_layers, parse_positions
from persona_nnsight.plan.interventions import Unedited, Write
from persona_nnsight.plan.plan import Edit, Plan
from persona_nnsight.prompts.rendering import Rendering

if TYPE_CHECKING:
    from persona_nnsight.models.loading import Model


class Sites(TypedDict):
    """The arguments of `build_plan` that come from the model and the site expressions."""

    layers: tuple[int, ...]
    positions: tuple[str, ...]
    eos_ids: tuple[int, ...]
    decoding: dict[str, Any]
    path: str
    rendering: Rendering


def sites_of(model: Model, layers: Layers, positions: Positions, rendering: Rendering) -> Sites:
    """Where an experiment reads and writes, on this model and its prompts."""
    return {
        "layers": parse_layers(layers, model.tree.n_layers),
        "positions": parse_positions(positions),
        "eos_ids": model.eos_ids,
        "decoding": model.decoding,
        "path": model.path,
        "rendering": rendering,
    }


def clean_text(generate: int) -> Edit:
    """The text of the unedited XY prompt."""
    return Edit(Unedited("clean", ("p_last",)), scored=False, generate=generate)


def floors(
    model: Model, host: str, positions: tuple[str, ...], layers: tuple[int, ...]
) -> list[Edit]:
    """What is scored beside edits of `host`, to show what rounding alone makes of a KL.

    XY as it is, or written back at the sites of the edits where they are edits of XY; and in few
    bits XY with its residuals rounded, beside edits of BY at the lowest of the layers.
    """
    of_xy = host == "XY"
    clean = Write("clean", positions, layers) if of_xy else Unedited("clean", positions)
    rounded = Write(ROUNDED, positions, layers if of_xy else layers[:1])
    return [Edit(clean), *([Edit(rounded)] if model.rounds else [])]


def checked(plan: Plan, model: Model, text_option: str = "--generate") -> Plan:
    """Refuse a plan with tokens that the model has no embedding or no positions for.

    `text_option` is what sets the length of its texts.
    """
    rows = model.embedding_rows
    for prompt in plan.prompts:
        if max(prompt.ids) >= rows:
            raise PersonaError(
                f"The tokenizer of {model.weights.spec!r} does not belong to its weights: the "
                f"prompt {quoted(prompt.text)} has the token id {max(prompt.ids)}, and the model "
                f"knows 0 to {rows - 1}; fetch or copy the model again, whole."
            )
    longest = max(plan.prompts, key=lambda prompt: len(prompt.ids))
    option = "--window" if plan.reference_tokens >= plan.longest_text else text_option
    tokens = len(longest.ids) + max(plan.reference_tokens, plan.longest_text)
    if tokens > model.tree.max_length:
        raise PersonaError(
            f"The prompt {quoted(longest.text)} and its continuation take {tokens} tokens and "
            f"this model has room for {model.tree.max_length}; use shorter texts or a smaller "
            f"{option}."
        )
    return plan
