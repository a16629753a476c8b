"""One prompt as token ids."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from persona_nnsight.errors import PersonaError

#: From a character or token on, up to but without another.
Span = tuple[int, int]

#: What every token of a prompt and its answer belongs to, one of them each.
FRAME, PERSONA, TASK, HEADER, ANSWER = GROUPS = ("frame", "persona", "task", "header", "answer")


@dataclass(frozen=True)
class TokenGroups:
    """Which tokens of a prompt belong to which of `GROUPS`.

    Persona and task stand in either order and one ends where the other begins; before them is the
    frame, after them the header, and last, from ``p_last`` on, the answer.

    Attributes:
        persona: indices of its tokens, from one up to but without another; empty where the prompt
            is a task alone.
        task: the same of the task.
        header: the same of the header; it ends at ``p_last``.
    """

    persona: Span
    task: Span
    header: Span

    def tokens(self, group: str) -> range:
        """Indices of a group's tokens in the prompt; of the answer that is ``p_last`` alone.

        Every token of a continuation belongs to the answer too.
        """
        spans = {
            FRAME: (0, min(self.persona[0], self.task[0])),
            PERSONA: self.persona,
            TASK: self.task,
            HEADER: self.header,
            ANSWER: (self.header[1], self.header[1] + 1),
        }
        return range(*spans[group])


@dataclass(frozen=True)
class Prompt:
    """One user message, rendered with the generation prompt.

    Attributes:
        text: the user message.
        ids: token ids of the whole rendered prompt; the last one is the site ``p_last``.
        user_last: index in ``ids`` of the last token of the user turn (site ``p_user_last``); None
            where the template writes the end of that turn differently when an answer follows.
        groups: which tokens belong to persona, task and what is around them; None where nobody
            asked.
    """

    text: str
    ids: tuple[int, ...]
    user_last: int | None
    groups: TokenGroups | None = None

    def to_data(self) -> dict[str, Any]:
        """As dictionaries, lists, strings and numbers; without groups where nobody asked."""
        data = asdict(self)
        if self.groups is None:
            del data["groups"]
        return data

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Prompt:
        """The prompt that `to_data` was given, also after a passage through JSON."""
        groups = data.get("groups")
        if groups is not None:
            groups = TokenGroups(**{name: (begin, end) for name, (begin, end) in groups.items()})
        return cls(**{**data, "ids": tuple(data["ids"]), "groups": groups})


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
