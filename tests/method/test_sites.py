"""Layer and position expressions."""

from __future__ import annotations

import pytest

from persona_nnsight import PersonaError
from persona_nnsight.method.sites import (
    DEFAULT_LAYERS,
    format_layers,
    generated_index,
    parse_layers,
    parse_positions,
)


@pytest.mark.parametrize(
    ("expression", "n_layers", "expected"),
    [
        ("8", 30, (8,)),
        ("0", 30, (0,)),
        ("4-7", 30, (4, 5, 6, 7)),
        ("12,4,8,4", 30, (4, 8, 12)),
        ("4-20:4", 30, (4, 8, 12, 16, 20)),
        ("4-19:4", 30, (4, 8, 12, 16)),
        (" 3 , 5-6 ", 30, (3, 5, 6)),
        ("all", 4, (0, 1, 2, 3)),
        (DEFAULT_LAYERS, 30, (8, 12, 16, 21, 26)),  # 16.5 and 25.5 round to even
        (DEFAULT_LAYERS, 26, (6, 10, 14, 18, 22)),  # the paper's Gemma-2-2B
        (DEFAULT_LAYERS, 28, (7, 11, 15, 20, 24)),  # the paper's Qwen2.5-1.5B
        (DEFAULT_LAYERS, 36, (9, 14, 20, 25, 31)),  # the paper's Qwen2.5-3B
        ("0%,100%", 30, (1, 29)),
        ("12.5%", 8, (1,)),
        (7, 30, (7,)),
        ([9, 3], 30, (3, 9)),
        (range(2, 4), 30, (2, 3)),
    ],
)
def test_layers(expression: str | int | list[int], n_layers: int, expected: tuple[int]) -> None:
    assert parse_layers(expression, n_layers) == expected


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("30", "Layer 30 does not exist: this model has 30 layers, 0 to 29"),
        ("4-99", "Layer 99 does not exist"),
        ("-1", "'-1' is not understood"),
        ([-1], "'-1' is not understood"),
        ("8-4", "'8-4' is empty"),
        ("4-8:0", "'4-8:0' is empty"),
        ("101%", "over 100%"),
        ("", "'' is not understood"),
        ("4,,8", "'' is not understood"),
        ("four", "'four' is not understood"),
        ("1.5", "'1.5' is not understood"),
        ("٣", "is not understood"),
        ("9" * 40, "is not understood"),
        ([], "No layer was named"),
        (True, "layers is True"),
    ],
)
def test_bad_layers(expression: str | list[int], says: str) -> None:
    with pytest.raises(PersonaError) as caught:
        parse_layers(expression, 30)
    assert says in str(caught.value)


def test_positions_come_in_sequence_order() -> None:
    assert parse_positions("g2,p_last, g1,p_user_last,g2") == ("p_user_last", "p_last", "g1", "g2")
    assert parse_positions(["g9"]) == ("g9",)
    assert [generated_index(name) for name in ("p_user_last", "p_last", "g1", "g9")] == [0, 0, 1, 9]


@pytest.mark.parametrize("expression", ["g0", "g10", "last", "", "p_last,,g1", "G1"])
def test_bad_positions(expression: str) -> None:
    with pytest.raises(PersonaError, match="use p_user_last, p_last, or g1 to g9"):
        parse_positions(expression)


def test_no_positions() -> None:
    with pytest.raises(PersonaError, match="No position was named"):
        parse_positions([])


def test_format_layers() -> None:
    assert format_layers((4, 5, 12)) == "4+5+12"
    assert format_layers((14,)) == "14"
