"""Where in a model an experiment reads or writes: expressions for layers and positions.

A *site* is a pair (layer L, position p). The residual at layer L is the input of decoder layer L
(TransformerLens ``resid_pre``, Hugging Face ``hidden_states[L]``). Positions have names:

* ``p_user_last``: the last token of the user turn, before the generation header;
* ``p_last``: the last token of the prompt;
* ``g1`` … ``g9``: the token generated first … ninth, at the position where it is fed back in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from persona_nnsight.errors import PersonaError, quoted

#: The five depths of the paper's first table, as fractions of the number of layers.
DEFAULT_LAYERS = "25%,40%,55%,70%,85%"
#: The depth at which the paper generates text and injects: layer 14 of 26.
EDITED_DEPTH = "55%"
DEFAULT_POSITIONS = "p_last,g1,g2"

#: How the sites of an unedited run are written in tables.
NO_LAYERS = "none"

#: Every position name, in the order in which the tokens stand in the sequence.
POSITIONS = ("p_user_last", "p_last", *(f"g{k}" for k in range(1, 10)))

_NUMBER = re.compile(r"[0-9]{1,6}")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")
_RANGE = re.compile(r"([0-9]{1,6})-([0-9]{1,6})(?::([0-9]{1,6}))?")


def parse_layers(layers: str | int | Iterable[int], n_layers: int) -> tuple[int, ...]:
    """The layer numbers that an expression names, ascending and without repeats.

    Args:
        layers: ``8``, ``4-12`` (both ends included), ``4-20:4`` (every fourth), ``25%`` (a depth:
            Python's ``round`` of the fraction times ``n_layers``, clipped to 1..n_layers-1),
            ``all``, several of these with commas, or the numbers themselves.
        n_layers: how many decoder layers the model has.

    Raises:
        PersonaError: an unreadable expression, or a layer outside 0..n_layers-1.
    """
    if isinstance(layers, bool):
        raise PersonaError(f"layers is {layers!r}; {_ALLOWED_LAYERS}.")
    terms: Sequence[str | int]
    if isinstance(layers, int):
        terms = [layers]
    elif isinstance(layers, str):
        terms = layers.split(",")
    else:
        terms = list(layers)
    found: set[int] = set()
    for term in terms:
        found.update(_layer_term(term, n_layers))
    if not found:
        raise PersonaError(f"No layer was named; {_ALLOWED_LAYERS}.")
    return tuple(sorted(found))


def parse_layer_sets(
    layers: str | int | Iterable[int], n_layers: int
) -> tuple[tuple[int, ...], ...]:
    """The sets of layers that an expression names: ``14; 10,12,14; 10-18:2`` are three.

    Args:
        layers: expressions of `parse_layers` with semicolons between them, or one set.
        n_layers: how many decoder layers the model has.

    Raises:
        PersonaError: as `parse_layers`.
    """
    terms = layers.split(";") if isinstance(layers, str) else [layers]
    return tuple(dict.fromkeys(parse_layers(term, n_layers) for term in terms))


_ALLOWED_LAYERS = (
    "write layers as '8', '4-12', '4,8,12', '4-20:4', '25%,40%' or 'all' (a list of whole numbers "
    "in Python)"
)


def _layer_term(term: str | int, n_layers: int) -> Iterable[int]:
    text = str(term).strip()
    if text == "all":
        return range(n_layers)
    if match := _PERCENT.fullmatch(text):
        percent = float(match[1])
        if percent > 100:
            raise PersonaError(f"Layer depth {text!r} is over 100%; use 0% to 100%.")
        return [min(max(round(n_layers * percent / 100), 1), n_layers - 1)]
    if _NUMBER.fullmatch(text):
        chosen: Sequence[int] = [int(text)]
    elif match := _RANGE.fullmatch(text):
        first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
        if first > last or step == 0:
            raise PersonaError(
                f"Layer range {text!r} is empty; write the lower layer first and a step of at "
                "least 1, like '4-20:4'."
            )
        chosen = range(first, last + 1, step)
    else:
        raise PersonaError(f"Layer expression {quoted(text)} is not understood; {_ALLOWED_LAYERS}.")
    if chosen[-1] >= n_layers:
        raise PersonaError(
            f"Layer {chosen[-1]} does not exist: this model has {n_layers} layers, "
            f"0 to {n_layers - 1}."
        )
    return chosen


def parse_positions(positions: str | Iterable[str]) -> tuple[str, ...]:
    """The position names that an expression lists, in sequence order and without repeats.

    Raises:
        PersonaError: a name that is not one of `POSITIONS`, or none at all.
    """
    names = positions.split(",") if isinstance(positions, str) else list(positions)
    wanted = {name.strip() for name in names}
    for name in sorted(wanted):
        if name not in POSITIONS:
            raise PersonaError(
                f"Position {quoted(name)} does not exist; use p_user_last, p_last, or g1 to g9 "
                "(the first to ninth generated token), with commas between them."
            )
    if not wanted:
        raise PersonaError("No position was named; use p_user_last, p_last, or g1 to g9.")
    return tuple(name for name in POSITIONS if name in wanted)


def generated_index(position: str) -> int:
    """k for ``gk``; 0 for the two prompt positions."""
    return int(position[1:]) if position.startswith("g") else 0


def format_layers(layers: Iterable[int]) -> str:
    """The layers of one edit as the tables write them: ``14``, ``4+5+6``, or ``none``."""
    return "+".join(str(layer) for layer in layers) or NO_LAYERS


def format_positions(positions: Iterable[str]) -> str:
    """The positions of one edit as the tables write them: ``p_last`` or ``p_last+g1``."""
    return "+".join(positions)
