"""One prompt as token ids."""

from __future__ import annotations

from dataclasses import dataclass

from persona_nnsight.errors import PersonaError


@dataclass(frozen=True)
class Prompt:
    """One user message, rendered with the generation prompt.

    Attributes:
        text: the user message.
        ids: token ids of the whole rendered prompt; the last one is the site ``p_last``.
        user_last: index in ``ids`` of the last token of the user turn (site ``p_user_last``); None
            where the template writes the end of that turn differently when an answer follows.
    """

    text: str
    ids: tuple[int, ...]
    user_last: int | None


def user_last(prompt: Prompt) -> int:
    """Index of the last token of the user turn.

    Raises:
        PersonaError: the chat template gives it no position.
    """
    if prompt.user_last is None:
        raise PersonaError(
            "Position 'p_user_last' does not exist with this model: its chat template ends the "
            "user turn with other tokens when an answer follows; use p_last, g1 to g9."
        )
    return prompt.user_last
