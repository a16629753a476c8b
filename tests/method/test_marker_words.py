"""Which words of a text count as markers, and where they stand in it."""

from __future__ import annotations

import random
import unicodedata

import pytest

from persona_nnsight.method.marker_words import _pieces, distinct_markers, find_markers, folded


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
    """A grid keeps markers folded."""
    text = f"From {word}, they said."
    found = find_markers(text, [folded(word)])
    assert [text[start:end] for _, start, end in found] == [word]


def found_in(text: str, marker: str) -> list[str]:
    """What is found of a marker, by the indices into the text."""
    return [text[start:end] for _, start, end in find_markers(text, [marker])]


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("老厨师说：切菜。", "厨师"),
        ("腕のいい料理人だ", "料理人"),
        ("ラーメンやラーメン屋", "ラーメン"),
        ("พ่อครัวใหญ่", "พ่อครัว"),
        ("ນີ້ແມ່ນພໍ່ຄົວໃຫຍ່", "ພໍ່ຄົວ"),
        ("គាត់ជាចុងភៅល្អ", "ចុងភៅ"),
        ("သူသည်စားဖိုမှူးဖြစ်သည်", "စားဖိုမှူး"),
        ("時々様", "時々"),
    ],
)
def test_a_script_without_spaces_needs_no_boundary(text: str, marker: str) -> None:
    assert marker in found_in(text, marker)


@pytest.mark.parametrize(
    ("text", "marker", "count"),
    [
        # Letters of a script without spaces end a Latin word, and begin one.
        ("我是Yoda大师，yodas不是", "yoda", 1),
        ("ヨーダ(Yoda)とYodaさん", "yoda", 2),
        ("白Tシャツ", "Tシャツ", 1),
        ("XLTシャツ", "Tシャツ", 0),
        ("卡拉OK店", "卡拉OK", 1),
        ("卡拉OKs", "卡拉OK", 0),
        ("2024年", "2024", 1),
        ("12024年", "2024", 0),
        # A Korean word begins after no Korean letter, and particles follow it.
        ("부처는 말했다. 부처님!", "부처", 2),
        ("정부처럼", "부처", 0),
        ("AI기술, 10년차", "년차", 1),
        ("Yoda는 CEO가", "ceo", 1),
        # Letters of other scripts than Latin stand in words with spaces.
        ("шеф-повар, шефы", "шеф", 1),
        ("الطاهي طاهي", "طاهي", 1),
        ("हिंदी हिंद", "हिंद", 1),
        ("हिंदी", "हिंदी", 1),
        # A symbol stands in no word, whatever letters it is folded to.
        ("Jedi™ Jedix", "jedi", 1),
        ("❤️, 👨‍🍳!", "❤", 1),
        ("❤️, 👨‍🍳!", "👨‍🍳", 1),
        ("x²", "x", 0),
    ],
)
def test_each_end_of_a_marker_has_the_rule_of_what_stands_there(
    text: str, marker: str, count: int
) -> None:
    assert len(found_in(text, marker)) == count


@pytest.mark.parametrize(
    ("text", "marker", "found"),
    [
        ("Un CAFE\u0301, un café.", "café", ["CAFE\u0301", "café"]),
        ("cafe\u0301 x\u0302 e", "cafe", []),
        ("cafe\u0301 x\u0302 e", "x", []),
        ("ＹＯＤＡ！ yoda", "yoda", ["ＹＯＤＡ", "yoda"]),
        ("yoda", "ＹＯＤＡ", ["yoda"]),
        ("Straße, STRASSE, strasse", "Straße", ["Straße", "STRASSE", "strasse"]),
        ("the ﬁre", "fire", ["ﬁre"]),
        ("the ﬁre", "ire", []),
        ("İstanbul i\u0307stanbul", "İSTANBUL", ["İstanbul", "i\u0307stanbul"]),
        ("ΣΟΦΟΣ σοφός", "σοφοσ", ["ΣΟΦΟΣ"]),
        ("ﾖｰﾀﾞだ", "ヨーダ", ["ﾖｰﾀﾞ"]),
        ("\u1100\u1161\u11a8각", "각", ["\u1100\u1161\u11a8"]),
        ("かは", "が", []),
        ("か\u3099は", "が", ["か\u3099"]),
        ("か\u3099は", "か", []),
        ("นำ นา", "น", ["น"]),
        ("sim\u00admer, yo\u200dda", "simmer", ["sim\u00admer"]),
        ("mise\u00a0en place", "mise en place", ["mise\u00a0en place"]),
        ("厨师\u3000长", "厨师 长", ["厨师\u3000长"]),
    ],
)
def test_how_a_letter_is_written_makes_no_difference(
    text: str, marker: str, found: list[str]
) -> None:
    assert found_in(text, marker) == found


def test_occurrences_of_one_marker_may_overlap() -> None:
    assert find_markers("哈哈哈", ["哈哈"]) == [("哈哈", 0, 2), ("哈哈", 1, 3)]
    # The first occurrence is no word, and the second begins within it.
    assert find_markers("ax+x+x", ["x+x"]) == [("x+x", 3, 6)]


@pytest.mark.parametrize("marker", ["", "\ufe0f"])
def test_a_marker_that_shows_nothing_is_nowhere(marker: str) -> None:
    assert find_markers("a\ufe0f b", [marker]) == []


#: Characters that change with what stands beside them, or become several.
ODD = (
    "aeiİıßﬁ²™ǅΣςᾳ㍿ｶﾞｶ=<นำกฺदी ❤-가ㄱㅏ\u1100\u1161\u11a8\u3099\u0301\u0323\u0345\u0338"
    "\u200d\ufe0f\u00ad"
)


def test_a_text_is_folded_piece_by_piece_as_it_is_whole() -> None:
    drawn = random.Random(0)
    for _ in range(3000):
        text = "".join(drawn.choices(ODD, k=drawn.randint(0, 8)))
        pieces = [text[start:end] for start, end in _pieces(text)]
        assert "".join(pieces) == text
        assert "".join(map(folded, pieces)) == folded(text)
        assert folded(folded(text)) == folded(text)
        for form in ("NFC", "NFD"):
            assert folded(unicodedata.normalize(form, text)) == folded(text)


def test_distinct_markers_are_each_once_in_their_own_order() -> None:
    text = "Place your stock to simmer; simmer, then place."
    assert distinct_markers(text, ["simmer", "chef", "place"]) == ["simmer", "place"]
    assert distinct_markers(text, []) == []
    assert distinct_markers("", ["simmer"]) == []
