"""Markers: words that give a persona away in a generated text (docs/method.md §8).

A marker with a space or a hyphen counts wherever it stands in the lower-cased text, any other only
as a whole word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def find_markers(text: str, markers: Iterable[str]) -> list[tuple[str, int, int]]:
    """Every occurrence of the markers in a text, in the order of the text.

    Args:
        text: a generated text, in any case.
        markers: in lower case, as `Persona.markers` holds them.

    Returns:
        (marker, start, end), so that ``text[start:end]`` is what was found.
    """
    lowered = text.lower()
    # Some characters get longer: from an index of the lowered text back to the text's own.
    origin = [index for index, character in enumerate(text) for _ in character.lower()]
    found = []
    for marker in markers:
        pattern = re.escape(marker)
        if " " not in marker and "-" not in marker:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        found += [
            (marker, origin[match.start()], origin[match.end() - 1] + 1)
            for match in re.finditer(pattern, lowered)
        ]
    return sorted(found, key=lambda occurrence: occurrence[1:])


def distinct_markers(text: str, markers: Sequence[str]) -> list[str]:
    """The markers that occur in a text, each once, in the order of `markers`."""
    present = {marker for marker, _, _ in find_markers(text, markers)}
    return [marker for marker in markers if marker in present]
