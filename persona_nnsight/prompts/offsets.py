"""Which characters of a text its tokens stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_nnsight.prompts.prompt import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def offsets(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[tuple[int, Span]] | None:
    """The tokens of a text, each with its characters; None where the tokenizer does not tell.

    Several tokens of one character have the same. White space at either end of a token may be left
    out, so that those of a token of white space may be none.
    """
    try:
        found = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        told = list(zip(found["input_ids"], found["offset_mapping"], strict=True))
    except Exception:  # written in Python, or by others: each says in its own way that it cannot
        return None
    pairs: list[tuple[int, Span]] = [(token, (begin, end)) for token, (begin, end) in told]
    begins = [begin for _, (begin, _) in pairs]
    tells = begins == sorted(begins) and any(begin < end for _, (begin, end) in pairs)
    return pairs if tells else None
