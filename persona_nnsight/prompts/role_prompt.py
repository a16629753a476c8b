"""A role prompt as text, and where the persona's and the task's own texts are in it."""

from __future__ import annotations

from dataclasses import dataclass

from persona_nnsight.prompts.prompt import Span


@dataclass(frozen=True)
class RolePrompt:
    """One user message.

    Attributes:
        text: the message.
        persona: the characters of the persona's text; empty, at the task's first, where the message
            is a task alone.
        task: the characters of the task's text.
    """

    text: str
    persona: Span
    task: Span


def bare_task(text: str) -> RolePrompt:
    """The task alone as the user message."""
    return RolePrompt(text, persona=(0, 0), task=(0, len(text)))
