"""Control text: what a chat template writes around a message, and a message must not contain.

A message that holds ``<|im_end|>`` ends its own turn and may begin another, so that the model no
longer reads one user turn. What counts is found from the tokenizer: its special tokens, and the
marks that the template writes around messages, whether they are tokens or plain text such as
``[/INST]`` and ``ASSISTANT:``. Ordinary words that a template writes ("user", a system message)
are no control text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from persona_nnsight.errors import PersonaError
from persona_nnsight.prompts.chat_template import PROBES, render
from persona_nnsight.prompts.rendering import Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTENT = re.compile("|".join(map(re.escape, PROBES)))
#: What stands beside a message may depend on the messages around it.
_LONGER = (("system", "user"), ("user", "assistant", "user"))

#: ``<|user|>``, ``<<SYS>>``, ``[INST]``, ``[/INST]``, ``<start_of_turn>``.
_BRACKETED = re.compile(r"<<?[^<>\s\d][^<>\s]{0,40}>>?|\[[^\[\]\s\d][^\[\]\s]{0,40}\]")
_LETTER = re.compile(r"[^\W\d_]")
_SYMBOL = re.compile(r"[^\w\s]|_")
_RULED = re.compile(r"[#=*<|{]")  # begins a heading, as in "### Response"
_ROLE_WORDS = 4  # "GPT4 Correct Assistant:" has three; a line of more words is a sentence


@dataclass(frozen=True)
class ControlText:
    """The control text of one tokenizer and its chat template.

    Attributes:
        pieces: what must not stand in a message.
        ids: token ids that only the template may bring in.
        frame: how often each of `ids` occurs in a prompt with a harmless message.
        plain: those of `pieces` that are several tokens; None where there are none.
        marks: how often each of `plain` occurs in such a prompt, decoded.
    """

    pieces: tuple[re.Pattern[str], ...]
    ids: frozenset[int]
    frame: Counter[int]
    plain: re.Pattern[str] | None
    marks: Counter[str]

    def find(self, text: str) -> str | None:
        """A piece of control text in a message, or None."""
        for pattern in self.pieces:
            if (found := pattern.search(text)) is not None:
                return found[0]
        return None

    def foreign_id(self, ids: Iterable[int]) -> int | None:
        """A control token that a prompt has more or less often than the template alone."""
        extra = Counter(filter(self.ids.__contains__, ids))
        if extra == self.frame:
            return None
        extra.subtract(self.frame)
        return next(token for token, count in extra.items() if count)

    def foreign_mark(self, decode: Callable[[], str]) -> str | None:
        """A mark of plain text that a prompt has, decoded, more often than the template alone."""
        if self.plain is None:
            return None
        return next(iter(Counter(self.plain.findall(decode())) - self.marks), None)


#: By tokenizer, with what it depends on besides: prompts are encoded by the thousand.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, ControlText]] = WeakKeyDictionary()


def control_text(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> ControlText:
    """The control text of a tokenizer, worked out once.

    Raises:
        PersonaError: the chat template leaves the message's text out; and what `render` raises.
    """
    key = tokenizer.chat_template, rendering
    found, known = _known.get(tokenizer, (None, None))
    if known is None or found != key:
        known = _derive(tokenizer, rendering)
        _known[tokenizer] = (key, known)
    return known


def _derive(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> ControlText:
    prompt = render(tokenizer, [("user", PROBES[0])], rendering)
    if PROBES[0] not in prompt:
        raise PersonaError(
            f"The chat template of {tokenizer.name_or_path!r} leaves a message of plain text out; "
            "use an instruction-tuned model whose template takes plain text."
        )
    # Each frame: the text before the first message, between messages, and after the last.
    frames = [_CONTENT.split(prompt)]
    for roles in _LONGER:
        with suppress(PersonaError):  # Gemma's takes no system message
            messages = list(zip(roles, PROBES, strict=False))
            frames.append(_CONTENT.split(render(tokenizer, messages, rendering)))
    written = "\n".join(segment for frame in frames for segment in frame)

    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_tokens, *(str(t) for t in added.values() if t.special)}
    tokens = special | {str(t) for t in added.values() if _is_mark(str(t)) and str(t) in written}
    marks = tokens | {mark for mark in _BRACKETED.findall(written) if _is_mark(mark)}
    any_mark = _any_of(re.escape(mark) for mark in marks if mark.strip())
    headings = {heading for frame in frames for heading in _headings(frame, any_mark)}

    ids = {*tokenizer.all_special_ids, *(i for i, t in added.items() if str(t) in tokens)}
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        ids.discard(tokenizer.unk_token_id)  # stands for any character the vocabulary lacks
    encoded: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    texts = headings | (marks - tokens)
    plain = _any_of(map(_whole, texts)) if texts else None
    return ControlText(
        # Two patterns, as one of literals alone is fast however many there are.
        pieces=(any_mark, _any_of(map(_whole, headings))),
        ids=frozenset(ids),
        frame=Counter(filter(ids.__contains__, encoded)),
        plain=plain,
        marks=Counter(plain.findall(decoded(tokenizer, encoded)) if plain else ()),
    )


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids as it is, special tokens included."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _is_mark(text: str) -> bool:
    """Whether a text cannot be an ordinary word, white space or punctuation."""
    return _LETTER.search(text) is not None and _SYMBOL.search(text) is not None


def _headings(frame: Sequence[str], marks: re.Pattern[str]) -> Iterator[str]:
    """The lines beside messages that say who speaks: ``USER:``, ``### Response:``."""
    for number, segment in enumerate(frame):
        lines = [line.strip() for line in marks.sub("\n", segment).splitlines() if line.strip()]
        # Before the first message may stand anything; who speaks comes last.
        for line in lines if number else lines[-1:]:
            if not _is_mark(line):
                continue
            if _RULED.match(line):
                yield line
            elif line.endswith(":"):
                words = line.split()
                yield line if len(words) <= _ROLE_WORDS else words[-1]


def _whole(text: str) -> str:
    """A pattern of a text that does not begin within a word."""
    return rf"(?<!\w){re.escape(text)}" if text[0].isalnum() else re.escape(text)


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """A pattern of the longest of several that match; of none, one that never matches."""
    return re.compile("|".join(sorted(patterns, key=len, reverse=True)) or r"(?!)")
