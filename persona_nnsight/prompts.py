"""From a user message to token ids, through the model's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """Render `text` as one user turn and encode it.

    The template is rendered to text and encoded with ``add_special_tokens=False``, since templates
    carry their own beginning-of-sequence token. A thinking switch, where a template has one, is
    off: the answer begins right after the prompt.

    Raises:
        PersonaError: no chat template, or one that refuses a lone user turn.
    """
    full = _encode(tokenizer, text, generation_prompt=True)
    user = _encode(tokenizer, text, generation_prompt=False)
    begins = bool(user) and full[: len(user)] == user
    return Prompt(text=text, ids=tuple(full), user_last=len(user) - 1 if begins else None)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, generation_prompt: bool) -> list[int]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise PersonaError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, so there is no "
            "user turn to put a role prompt in; use an instruction-tuned model, or add a "
            "chat_template.jinja to the model's directory."
        )
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            enable_thinking=False,
        )
    except (TemplateError, ValueError) as error:
        raise PersonaError(
            f"The chat template of {tokenizer.name_or_path!r} refuses a single user message "
            f"({error}); use an instruction-tuned model whose template takes one."
        ) from error
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids
