"""Markers: words that give a persona away in a generated text (docs/method.md §8).

A marker with a space or a hyphen counts wherever it stands, any other only as a whole word, as far
as its script sets words apart. What decides is the character at each end of the marker: letters,
digits and symbols must have no letter or digit beside them; letters of a script without spaces
(Chinese, Japanese, Thai, …) may, and letters of such a script end a word of another; a Korean
marker begins a word, and particles may follow it. Case, and how a letter is composed or how wide it
is, make no difference (`folded`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from unicodedata import category, combining, normalize

import regex

#: Shows nothing: variation selectors, zero-width joiners, soft hyphens, marks of direction.
_IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")
#: Letters between which a line may break: those of scripts that put no spaces between words.
_UNSPACED = regex.compile(
    r"[\p{Line_Break=Ideographic}\p{Line_Break=Conditional_Japanese_Starter}"
    r"\p{Line_Break=Nonstarter}\p{Line_Break=Complex_Context}\p{Line_Break=Aksara}"
    r"\p{Line_Break=Aksara_Start}\p{Line_Break=Aksara_Prebase}]"
)
_HANGUL = regex.compile(r"\p{Script=Hangul}")

#: What a character is to a word: of one that spaces set apart, of a Korean one, of one in a script
#: without spaces, a combining mark, or of none.
_Kind = Literal["spaced", "korean", "unspaced", "mark", ""]


def find_markers(text: str, markers: Iterable[str]) -> list[tuple[str, int, int]]:
    """Every occurrence of the markers in a text, in the order of the text.

    Args:
        text: a generated text.
        markers: words, in any case and form.

    Returns:
        (marker, start, end), so that ``text[start:end]`` is what was found.
    """
    searched = _Searched.of(text)
    found = [
        (marker, searched.starts[begin], searched.ends[end - 1])
        for marker in markers
        for begin, end in searched.occurrences(folded(marker))
    ]
    return sorted(found, key=lambda occurrence: occurrence[1:])


def distinct_markers(text: str, markers: Sequence[str]) -> list[str]:
    """The markers that occur in a text, each once, in the order of `markers`."""
    present = {marker for marker, _, _ in find_markers(text, markers)}
    return [marker for marker in markers if marker in present]


@lru_cache(maxsize=4096)
def folded(text: str) -> str:
    """A text as it is compared: Unicode's NFKC and case folding, without what shows nothing."""
    shown = normalize("NFD", _IGNORABLE.sub("", text))
    return normalize("NFKC", normalize("NFKC", shown.casefold()).casefold())


@dataclass(frozen=True)
class _Searched:
    """A text to be searched.

    Attributes:
        folded: the text as it is compared.
        starts, ends: the piece of the text that each of its characters comes from.
        kinds: of each of its characters; a mark is what the letter before it is.
        marks: whether each of its characters is a combining mark.
    """

    folded: str
    starts: Sequence[int]
    ends: Sequence[int]
    kinds: Sequence[_Kind]
    marks: Sequence[bool]

    @classmethod
    def of(cls, text: str) -> _Searched:
        """Fold a text, piece by piece."""
        letters: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        kinds: list[_Kind] = []
        for start, end in _pieces(text):
            # Of a symbol such as ™, which is folded to letters, none stands in a word.
            symbol = _kind(text[start]) == ""
            for letter in folded(text[start:end]):
                kind = _kind(letter)
                letters.append(letter)
                starts.append(start)
                ends.append(end)
                kinds.append("" if symbol else kind)
        marks = [kind == "mark" for kind in kinds]
        for at, mark in enumerate(marks):
            if mark:
                kinds[at] = kinds[at - 1] if at else ""
        return cls("".join(letters), starts, ends, kinds, marks)

    def occurrences(self, marker: str) -> Iterator[tuple[int, int]]:
        """Where a folded marker begins and ends."""
        anywhere = " " in marker or "-" in marker
        at = self.folded.find(marker) if marker else -1
        while at >= 0:
            end = at + len(marker)
            if anywhere or (self._begins_word(at) and self._ends_word(end)):
                yield at, end
            at = self.folded.find(marker, at + 1)

    def _begins_word(self, at: int) -> bool:
        """Whether what begins here is no later part of a word, or of one letter of the text."""
        if at == 0:
            return True
        before, first = self.kinds[at - 1], self.kinds[at]
        if self.starts[at - 1] == self.starts[at]:
            return False
        if first == "korean":
            return before != "korean"
        return first == "unspaced" or before != "spaced"

    def _ends_word(self, end: int) -> bool:
        """Whether a word, and a letter of the text, can end before this character."""
        if end == len(self.folded):
            return True
        last, after = self.kinds[end - 1], self.kinds[end]
        if self.starts[end - 1] == self.starts[end] or (last and self.marks[end]):
            return False
        return last in ("korean", "unspaced") or after != "spaced"


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """The pieces of a text that are folded alone as they are within it: a letter and its marks."""
    start = 0
    for end in range(1, len(text)):
        piece, following = text[start:end], text[end]
        if following.isascii() or _stands_alone(piece, following):
            yield start, end
            start = end
    if text:
        yield start, len(text)


def _stands_alone(piece: str, following: str) -> bool:
    """Whether a character does not change with the piece before it, nor what follows it."""
    if _IGNORABLE.match(following) or combining(normalize("NFKD", following)[0]):
        return False
    return folded(piece + following) == folded(piece) + folded(following)


@lru_cache(maxsize=4096)
def _kind(character: str) -> _Kind:
    if category(character).startswith("M"):
        return "mark"
    if not (character.isalnum() or character == "_"):
        return ""
    if _HANGUL.match(character):
        return "korean"
    return "unspaced" if _UNSPACED.match(character) else "spaced"
