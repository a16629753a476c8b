"""From a user message to token ids, through the model's own chat template."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from persona_nnsight.errors import PersonaError
from persona_nnsight.prompts.chat_template import render
from persona_nnsight.prompts.control_text import control_text, decoded
from persona_nnsight.prompts.offsets import offsets
from persona_nnsight.prompts.prompt import Prompt
from persona_nnsight.prompts.rendering import UNDATED, Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AROUND = 40  # characters of a refused text that a message shows beside the piece


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, rendering: Rendering = UNDATED
) -> Prompt:
    """Render `text` as one user turn and encode it.

    The template is rendered to text and encoded with ``add_special_tokens=False``, since templates
    carry their own beginning-of-sequence token. A thinking switch, where a template has one, is
    off: the answer begins right after the prompt.

    Raises:
        PersonaError: no chat template, one that refuses a lone user turn, or control text of it
            in `text` (`persona_nnsight.prompts.control_text`).
    """
    control = control_text(tokenizer, rendering)
    if (piece := control.find(text)) is not None:
        raise _forged(tokenizer, text, piece)
    rendered = render(tokenizer, [("user", text)], rendering)
    full = _encode(tokenizer, rendered)
    # The tokenizer may read other letters, such as full-width ones, as those of control text.
    if (token := control.foreign_id(full)) is not None:
        raise _forged(tokenizer, text, _spelling(tokenizer, rendered, token))
    if (mark := control.foreign_mark(partial(decoded, tokenizer, full))) is not None:
        raise _forged(tokenizer, text, mark)
    turn = render(tokenizer, [("user", text)], rendering, generation_prompt=False)
    user = _encode(tokenizer, turn)
    begins = bool(user) and full[: len(user)] == user
    return Prompt(text=text, ids=tuple(full), user_last=len(user) - 1 if begins else None)


def _encode(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


def _spelling(tokenizer: PreTrainedTokenizerBase, rendered: str, token: int) -> str:
    """How a control token is written in a text, where the tokenizer tells; else its own name."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    pairs = offsets(tokenizer, rendered) or []
    spellings = {rendered[begin:end] for id_, (begin, end) in pairs if id_ == token}
    return next(iter(sorted(spellings - {name})), name)


def _forged(tokenizer: PreTrainedTokenizerBase, text: str, piece: str) -> PersonaError:
    at = text.find(piece)
    begin, end = max(at - _AROUND, 0), at + len(piece) + _AROUND
    excerpt = "…" * (begin > 0) + text[begin:end] + "…" * (end < len(text))
    contains = "contains" if at >= 0 else "is read by the tokenizer as if it contained"
    return PersonaError(
        f"The text {excerpt!r} {contains} {piece!r}, a control token of the chat template of "
        f"{tokenizer.name_or_path!r}, which would end or forge a turn; write it otherwise, such as "
        "with a space inside or without its brackets."
    )
