"""Which tokens of a prompt are the persona's and the task's, from the characters of its text.

A token belongs to the group of its first character that is not white space, and one that is all
white space to the group of its first character. What stands between persona and task belongs to
the later of them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from persona_nnsight.errors import PersonaError, quoted
from persona_nnsight.prompts.chat_template import PROBES, render
from persona_nnsight.prompts.encoding import encode_prompt
from persona_nnsight.prompts.offsets import offsets
from persona_nnsight.prompts.prompt import Prompt, Span, TokenGroups
from persona_nnsight.prompts.rendering import UNDATED, Rendering
from persona_nnsight.prompts.role_prompt import RolePrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_grouped(
    tokenizer: PreTrainedTokenizerBase, message: RolePrompt, rendering: Rendering = UNDATED
) -> Prompt:
    """Render a role prompt as one user turn, encode it, and tell its tokens apart.

    Raises:
        PersonaError: what `encode_prompt` raises; a tokenizer that does not tell which characters a
            token stands for, or a chat template that writes the message several times or leaves a
            part of it out.
    """
    prompt = encode_prompt(tokenizer, message.text, rendering)
    rendered = render(tokenizer, [("user", message.text)], rendering)
    persona, task = _in_rendered(tokenizer, message, rendered, rendering)
    spans = _characters(tokenizer, rendered, prompt)
    starts = [_first_character(rendered, span, before) for span, before in spans]
    last = len(starts) - 1

    def token(character: int) -> int:
        """The first token from a character on; p_last is the answer's, whatever it stands for."""
        return min(bisect_left(starts, character), last)

    persona_first = persona <= task
    first, second = (persona, task) if persona_first else (task, persona)
    ends = token(first[0]), token(first[1]), token(second[1])
    own = (ends[0], ends[1]), (ends[1], ends[2])
    groups = TokenGroups(
        persona=own[0 if persona_first else 1],
        task=own[1 if persona_first else 0],
        header=(ends[2], last),
    )
    return replace(prompt, groups=groups)


def pieces(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, rendering: Rendering = UNDATED
) -> list[str]:
    """The rendered prompt cut into its tokens; "" for a token of a character that has had one.

    Raises:
        PersonaError: see `encode_grouped`.
    """
    rendered = render(tokenizer, [("user", prompt.text)], rendering)
    return [rendered[before:end] for (_, end), before in _characters(tokenizer, rendered, prompt)]


def _characters(
    tokenizer: PreTrainedTokenizerBase, rendered: str, prompt: Prompt
) -> list[tuple[Span, int]]:
    """The characters of each token, and where those of the tokens before it end."""
    found = offsets(tokenizer, rendered)
    if found is None or [token for token, _ in found] != list(prompt.ids):
        raise PersonaError(
            f"The tokenizer of {tokenizer.name_or_path!r} does not tell which characters its "
            "tokens stand for, so that those of the persona and of the task cannot be told apart; "
            "use a model with a fast tokenizer (tokenizer.json)."
        )
    placed, reached = [], 0
    for _, span in found:
        placed.append((span, reached))
        reached = max(reached, span[1])
    return placed


def _first_character(rendered: str, span: Span, before: int) -> int:
    """The first of a token's characters that is not white space; if all are, the first."""
    begin, end = span
    for index in range(begin, end):
        if not rendered[index].isspace():
            return index
    # White space may be left out of what a token is said to stand for.
    return before if rendered[before:begin].isspace() else begin


def _in_rendered(
    tokenizer: PreTrainedTokenizerBase, message: RolePrompt, rendered: str, rendering: Rendering
) -> tuple[Span, Span]:
    """The characters of the persona's and of the task's text in the rendered prompt."""
    around = render(tokenizer, [("user", PROBES[0])], rendering).split(PROBES[0])
    if len(around) != 2:
        raise PersonaError(
            f"The chat template of {tokenizer.name_or_path!r} writes a message {len(around) - 1} "
            "times, so that the persona is in several places; use a model whose template writes it "
            "once."
        )
    before, after = around
    expected = before + message.text + after
    # A template may write something else around some messages, but mostly does not.
    known = rendered.startswith(before) and rendered.endswith(after)
    head, tail = (len(before), len(after)) if known else (0, 0)
    own, written = (text[head : len(text) - tail] for text in (expected, rendered))

    def place(span: Span) -> Span:
        offset = len(before) - head
        begin, end = _moved((offset + span[0], offset + span[1]), own, written)
        if begin == end:
            raise PersonaError(
                f"The chat template of {tokenizer.name_or_path!r} leaves the text "
                f"{quoted(message.text[slice(*span)])} out of the prompt; write it otherwise, or "
                "use a model whose template takes it."
            )
        return head + begin, head + end

    task = place(message.task)
    is_bare = message.persona[0] == message.persona[1]
    return (task[0], task[0]) if is_bare else place(message.persona), task


def _moved(span: Span, expected: str, written: str) -> Span:
    """Where characters of one text are in another that differs a little, such as in its ends."""
    if expected == written:
        return span
    begin, end = span
    new_begin = new_end = len(written)
    blocks = SequenceMatcher(None, expected, written, autojunk=False).get_opcodes()
    for _, i1, i2, j1, j2 in blocks:
        if i1 <= begin < i2:
            new_begin = min(j1 + begin - i1, j2)
        if i1 < end <= i2:
            new_end = j2 if end == i2 else min(j1 + end - i1, j2)
    return min(new_begin, new_end), new_end
