"""The tokens that end an answer: all that a model's files give, and what its template writes.

A fine-tuned model often ends its turn with another token than the one its configuration had before.
Whoever knew of one alone would decode past the other, and count what stands behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from persona_nnsight.errors import PersonaError
from persona_nnsight.models.weights.model_files import CONFIG, GENERATION_CONFIG, settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A content that no template has a reason to change.
_CONTENT = ".Qxkzvend."


def end_tokens(
    directory: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
) -> tuple[int, ...]:
    """The ids of all tokens that end a continuation, by number.

    They are those of generation_config.json, of config.json and its text model's part, of the
    tokenizer, and the one with which the chat template ends an answer. What no token of the model
    has as its id (-1 is written for none) is left out.

    Args:
        directory: of the model; its weights are not read.
        config: its configuration, whose default counts where no file gives a token.
        tokenizer: its tokenizer.
        n_tokens: how many tokens the model tells apart.

    Raises:
        PersonaError: an end token that is no number.
    """
    given = {token for value in _given(directory, config) for token in _ids(value)}
    given.update(_ids(tokenizer.eos_token_id))
    given.update(_ids(answer_end(tokenizer)))
    given = given or {*_ids(config.get_text_config(decoder=True).eos_token_id)}
    return tuple(sorted(token for token in given if 0 <= token < n_tokens))


def _given(directory: Path, config: PreTrainedConfig) -> Iterator[Any]:
    """What a model's files give.

    The files themselves are read, as a configuration has a default of its class where they are
    silent, and a model without weights has no generation configuration.
    """
    for name in (GENERATION_CONFIG, CONFIG):
        parts = _text_parts(settings_of(directory, name), config)
        yield from (part.get("eos_token_id") for part in parts)


def _text_parts(settings: dict[str, Any], config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The settings of a model as a whole, and of its parts down to its text model."""
    yield settings
    text = config.get_text_config(decoder=True)
    for name, part in settings.items():
        own = getattr(config, name, None) if isinstance(part, dict) else None
        if isinstance(own, PreTrainedConfig) and own.get_text_config(decoder=True) is text:
            yield from _text_parts(part, own)


def _ids(value: Any) -> list[int]:
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise PersonaError(
            f"The model's eos_token_id is {value!r}; {GENERATION_CONFIG} and {CONFIG} must give a "
            "token id or a list of them."
        )
    return [*ids]


def answer_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an answer; None where it writes no such token.

    It is the first behind the answer that is no ordinary text, such as ``<|im_end|>``.
    """
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _CONTENT}]
    try:
        rendered = str(
            tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
        )
        _, answer, behind = rendered.rpartition(_CONTENT)
        ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"] if answer else []
    except Exception:  # no template, or a program that trips over an answer
        return None
    control = {
        token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special or _is_mark(added.content)
    }
    control.update(tokenizer.all_special_ids)
    control -= {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    return next((token for token in ids if token in control), None)


def _is_mark(text: str) -> bool:
    """Whether a text cannot be an ordinary word, white space or punctuation."""
    letters = any(char.isalpha() for char in text)
    return letters and any(not char.isalnum() and not char.isspace() for char in text)
