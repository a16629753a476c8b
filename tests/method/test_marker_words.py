"""Which words of a text count as markers, and where they stand in it."""

from __future__ import annotations

import pytest

from persona_nnsight.method.marker_words import distinct_markers, find_markers


@pytest.mark.parametrize(
    ("marker", "text", "starts"),
    [
        ("art", "Art, an art; start and artful are none.", [0, 8]),
        ("art", "art_school and art2 are one word each", []),
        ("art", "the art-school, (art) and art's", [4, 17, 26]),
        # A space or a hyphen makes it a substring, also inside longer words.
        ("to be", "unto bees, To be", [2, 11]),
        ("-old", "age-old, 3-olden", [3, 10]),
        ("year-old", "a 3-year-olds' game", [4]),
        ("mise en place", "mise  en place", []),
        ("yoda", "YODA Yoda yOdA", [0, 5, 10]),
        ("œuvre", "chef d'ŒUVRE", [7]),
    ],
)
def test_where_a_marker_occurs(marker: str, text: str, starts: list[int]) -> None:
    found = find_markers(text, [marker])
    assert found == [(marker, start, start + len(marker)) for start in starts]


@pytest.mark.parametrize(
    ("marker", "text", "count"),
    [
        ("node.js", "nodexjs", 0),
        ("node.js", "Node.js or node.js", 2),
        ("a|b", "a b", 0),
        ("a|b", "A|B", 1),
        ("(sic) so", "he said (sic) so", 1),
        ("[a-z]", "b [a-z]", 1),
        ("c++", "We write C++ here, c++11 and C++.", 2),
        ("$5", "It costs $5, not US$50.", 1),
    ],
)
def test_a_marker_is_text_and_no_pattern(marker: str, text: str, count: int) -> None:
    assert [marker] * count == [name for name, _, _ in find_markers(text, [marker])]


def test_occurrences_come_in_the_order_of_the_text_and_may_overlap() -> None:
    text = "Mise en place: the place, en place."
    found = find_markers(text, ["place", "en place", "mise en place", "chef"])
    assert found == [
        ("mise en place", 0, 13),
        ("en place", 5, 13),
        ("place", 8, 13),
        ("place", 19, 24),
        ("en place", 26, 34),
        ("place", 29, 34),
    ]


@pytest.mark.parametrize(
    ("before", "marker"),
    [("İİ ", "yoda"), ("ẞ İ ǅ ", "the force"), ("ﬁ İ\u0307 ", "yoda"), ("🙂 İ ", "year-old")],
)
def test_indices_fit_the_text_after_letters_that_lower_case_makes_longer(
    before: str, marker: str
) -> None:
    text = f"{before}{marker.upper()} {before}{marker}"
    found = find_markers(text, [marker])
    assert [text[start:end] for _, start, end in found] == [marker.upper(), marker]


@pytest.mark.parametrize("word", ["İstanbul", "ΟΔΟΣ", "STRASSE", "Éclair"])
def test_a_marker_is_found_as_it_was_written(word: str) -> None:
    """A grid keeps markers as ``str.lower`` makes them, which is what the text is searched for."""
    text = f"From {word}, they said."
    found = find_markers(text, [word.lower()])
    assert [text[start:end] for _, start, end in found] == [word]


def test_distinct_markers_are_each_once_in_their_own_order() -> None:
    text = "Place your stock to simmer; simmer, then place."
    assert distinct_markers(text, ["simmer", "chef", "place"]) == ["simmer", "place"]
    assert distinct_markers(text, []) == []
    assert distinct_markers("", ["simmer"]) == []
