"""Which sentences a run's tables allow, and which they do not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_nnsight.analysis.columns import read_table
from persona_nnsight.analysis.kl_tables import contrasts, drawn_kls, kl_summary
from persona_nnsight.analysis.marker_tables import marker_contrasts, marker_summary
from persona_nnsight.analysis.verdicts import best_of, verdicts
from persona_nnsight.analysis.wording import caveat, ties
from persona_nnsight.experiments.registry import NAMES, experiment_named

NAN = math.nan

BELOW, ACROSS, ABOVE, UNKNOWN = (-0.3, -0.1), (-0.2, 0.1), (0.1, 0.4), (NAN, NAN)
"""Intervals of a difference; the last is that of too few cells."""


def summary_row(
    condition: str,
    layers: str,
    median: float,
    *,
    position: str = "p_last",
    n: int = 12,
    share: float = NAN,
    of: str = "recovered",
    pooled: float | None = None,
    **factors: float,
) -> dict[str, object]:
    """A row of ``summary.csv`` with intervals a tenth to either side, where cells suffice."""
    wide = 0.1 if n >= 5 else NAN
    return {
        "condition": condition,
        "host": "XY" if of == "recovered" else "BY",
        "position": position,
        "layers": layers,
        **factors,
        "median": median,
        "median_lo": median - wide,
        "median_hi": median + wide,
        "n": n,
        of: share,
        f"{of}_lo": share - wide,
        f"{of}_hi": share + wide,
        f"{of}_pooled": share if pooled is None else pooled,
    }


def contrast_row(
    condition: str,
    control: str,
    layers: str,
    ends: tuple[float, float],
    *,
    position: str = "p_last",
    n: int = 12,
    lower: int = 6,
    margin: float = NAN,
    **factors: float,
) -> dict[str, object]:
    words = verdicts(np.array(ends[:1]), np.array(ends[1:]), margin=margin, floor=1e-5)
    return {
        "host": "XY",
        "position": position,
        "layers": layers,
        "condition": condition,
        "control": control,
        "n": n,
        "difference": sum(ends) / 2,
        "lo": ends[0],
        "hi": ends[1],
        "lower": lower,
        "margin": margin,
        "verdict": str(words[0]),
        **factors,
    }


def said(
    command: str,
    summary: Sequence[Mapping[str, object]],
    contrasts: Sequence[Mapping[str, object]] = (),
    *,
    older: bool = False,
) -> list[str]:
    # No row, but the columns, as `tables.contrasts` gives it.
    columns = list(contrast_row("additive", "bb", "8", ACROSS))
    frames = {
        "summary": pd.DataFrame(summary),
        "contrasts": pd.DataFrame(contrasts, columns=None if contrasts else columns),
    }
    if older:  # a run directory of a version without them
        new = ["margin", "verdict", "recovered_pooled", "gap_closed_pooled", "floor"]
        frames = {name: table.drop(columns=new, errors="ignore") for name, table in frames.items()}
    return experiment_named(command).findings(frames)


# --- substitute


def test_a_substitution_is_set_against_its_controls_layer_by_layer() -> None:
    layers = ["8", "12", "16", "21", "26"]
    shares = [0.881, 0.6, 0.602, -0.15, 0.878]
    medians = [0.05, 0.5, 0.0999, 0.1, 1.5]  # of bb
    (sentence,) = said(
        "substitute",
        [
            *(
                summary_row("additive", layer, 0.1, share=share)
                for layer, share in zip(layers, shares, strict=True)
            ),
            *(summary_row("by", layer, 0.01, share=0.5) for layer in layers),
            *(
                summary_row("bb", layer, median, share=0.0)
                for layer, median in zip(layers, medians, strict=True)
            ),
        ],
        [
            *(contrast_row("additive", "bb", layer, BELOW) for layer in layers),
            *(
                contrast_row("additive", "by", layer, ends)
                for layer, ends in zip(layers, [BELOW, ABOVE, ABOVE, ACROSS, UNKNOWN], strict=True)
            ),
            *(contrast_row("additive", "other_x", layer, ACROSS) for layer in layers),
        ],
    )
    assert sentence == (
        "At p_last the additive vector recovers 88 % (layers 8 and 26), 60 % (layers 12 and 16), "
        "-15 % (layer 21) of what writing h_BB loses (medians over cells); it costs less than "
        "leaving the persona out (by) at layer 8, costs more than it at layers 12 and 16 and is "
        "undecided against it at layer 21; it is undecided against another persona's Δ_X (other_x) "
        "at layers 8, 12, 16, 21 and 26 (by medians of paired differences). At layers 8 and 16 a "
        "low KL is nearly free: even the median KL of h_BB over cells is at most 0.1 nats."
    )


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((-0.2, -2e-5), "costs less than"),
        ((-0.2, -1e-6), "is undecided against"),
        ((-0.2, 0.0), "is undecided against"),
        ((0.0, 0.0), "is undecided against"),
        ((0.0, 0.2), "is undecided against"),
        ((1e-6, 0.2), "is undecided against"),
        ((2e-5, 0.2), "costs more than"),
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_only_an_interval_that_leaves_out_rounding_tells_apart(
    ends: tuple[float, float], verdict: str, older: bool
) -> None:
    (sentence,) = said(
        "substitute",
        [summary_row("additive", "8", 0.2, share=0.8), summary_row("bb", "8", 1.0, share=0.0)],
        [contrast_row("additive", "by", "8", ends)],
        older=older,
    )
    assert sentence == (
        "At p_last the additive vector recovers 80 % (layer 8) of what writing h_BB loses (median "
        f"over cells); it {verdict} leaving the persona out (by) at layer 8 (by medians of paired "
        "differences)."
    )


def test_as_good_as_names_its_margin() -> None:
    (sentence,) = said(
        "substitute",
        [
            *(summary_row("additive", layer, 0.2, share=0.8) for layer in ("8", "12", "16")),
            *(
                summary_row("bb", layer, median, share=0.0)
                for layer, median in (("8", 2.0), ("12", 4.0), ("16", 1.0))
            ),
        ],
        [
            contrast_row("additive", "by", "8", ACROSS, margin=0.3),
            contrast_row("additive", "by", "12", ACROSS, margin=0.6),
            contrast_row("additive", "by", "16", ACROSS, margin=0.15),
        ],
    )
    assert sentence.endswith(
        "; it is as good as leaving the persona out (by) (within ± 15 % of h_BB's KL) at layers 8 "
        "and 12 and is undecided against it at layer 16 (by medians of paired differences)."
    )


def test_a_pooled_share_is_told_where_it_is_another() -> None:
    summary = [
        summary_row("additive", "8", 0.2, share=0.8, pooled=0.84),
        summary_row("additive", "12", 0.2, share=0.6, pooled=0.47),
        *(summary_row("bb", layer, 1.0, share=0.0) for layer in ("8", "12")),
    ]
    (sentence,) = said("substitute", summary)
    assert sentence == (
        "At p_last the additive vector recovers 80 % (layer 8), 60 % (layer 12) of what writing "
        "h_BB loses (medians over cells; pooled 47 % (layer 12))."
    )


def test_each_position_has_its_own_sentence_and_controls() -> None:
    first, second = said(
        "substitute",
        [
            summary_row(condition, "8", median, position=position, share=share)
            for condition, position, median, share in (
                ("additive", "p_last", 0.2, 0.8),
                ("additive", "g1", 0.02, 0.6),
                ("bb", "p_last", 1.0, 0.0),
                ("bb", "g1", 0.05, 0.0),
            )
        ],
        [
            contrast_row("additive", "by", "8", ABOVE),
            contrast_row("additive", "by", "8", BELOW, position="g1"),
            # Of another condition: no verdict on the additive vector.
            contrast_row("remove_x", "other_x", "8", BELOW, position="g1"),
        ],
    )
    assert first.startswith("At p_last the additive vector recovers 80 % (layer 8) of")
    by = " leaving the persona out (by) at layer 8 (by medians of paired differences)."
    assert first.endswith(f"; it costs more than{by}")
    assert second.startswith("At g1 the additive vector recovers 60 % (layer 8) of")
    assert f"; it costs less than{by} At layer 8" in second
    assert second.endswith(
        " a low KL is nearly free: even the median KL of h_BB over cells is at most 0.05 nats."
    )


def test_nothing_is_said_of_a_substitution_without_the_controls_it_needs() -> None:
    additive = summary_row("additive", "8", 0.2)
    by = summary_row("by", "8", 0.3)
    against = [contrast_row("additive", "by", "8", BELOW)]
    without_bb = [
        "At p_last the additive vector costs less than leaving the persona out (by) at layer 8 (by "
        "medians of paired differences)."
    ]
    assert said("substitute", [additive, by], against) == without_bb
    del additive["recovered"]
    del by["recovered"]
    assert said("substitute", [additive, by], against) == without_bb
    assert said("substitute", [additive, by]) == []
    assert said("substitute", [by, summary_row("bb", "8", 0.01, share=0.0)]) == [
        "At p_last, layer 8, a low KL is nearly free: even the median KL of h_BB over cells is at "
        "most 0.01 nats."
    ]


def test_a_share_of_nothing_has_no_sign() -> None:
    (sentence,) = said(
        "substitute",
        [summary_row("additive", "8", 1.0, share=-0.002), summary_row("bb", "8", 1.0, share=0.0)],
    )
    assert "recovers 0 % (layer 8)" in sentence


@pytest.mark.parametrize(
    ("n", "ending"),
    [
        (1, "1 cell is too few for intervals; expect other cells to differ."),
        (4, "4 cells are too few for intervals; expect other cells to differ."),
    ],
)
def test_few_cells_get_a_warning_and_no_verdict(n: int, ending: str) -> None:
    sentence, warning = said(
        "substitute",
        [
            summary_row("additive", "8", 0.2, share=0.8, n=n),
            summary_row("bb", "8", 1.0, share=0.0, n=n),
            summary_row("by", "8", 0.5, share=0.5, n=n),
        ],
        [contrast_row("additive", "by", "8", UNKNOWN, n=n, lower=n)],
    )
    assert sentence == (
        "At p_last the additive vector recovers 80 % (layer 8) of what writing h_BB loses (median "
        "over cells)."
    )
    assert warning == ending


def test_no_warning_where_only_some_edits_lack_cells() -> None:
    found = said(
        "substitute",
        [
            summary_row("additive", "8", 0.2, share=0.8),
            summary_row("bb", "8", 1.0, share=0.0),
            summary_row("by", "8", 1.0, share=0.0, n=2),
        ],
        [contrast_row("additive", "by", "8", UNKNOWN, n=2)],
    )
    assert len(found) == 1
    assert "leaving the persona out" not in found[0]


# --- inject


def injection(**shares: Sequence[float]) -> list[dict[str, object]]:
    layers = ["8", "14", "8+14"]
    return [
        summary_row("host", "none", 3.054, share=0.0, of="gap_closed"),
        *(
            summary_row(condition, layer, 2.0, share=share, of="gap_closed")
            for condition, values in shares.items()
            for layer, share in zip(layers, values, strict=False)
        ),
    ]


def test_an_injection_is_told_by_its_best_layers() -> None:
    found = said(
        "inject",
        injection(oracle=[0.1, 0.234, NAN], cached=[-0.3, -0.2, -0.052]),
        [
            contrast_row("oracle", "host", "8", ACROSS),
            contrast_row("oracle", "host", "14", BELOW),
            contrast_row("oracle", "host", "8+14", ACROSS),
            contrast_row("cached", "host", "8", BELOW),
            contrast_row("cached", "host", "14", BELOW),
            contrast_row("cached", "host", "8+14", ABOVE),
        ],
    )
    host, oracle, cached = found
    assert host == (
        "The prompt without the persona is 3.05 nats from the prompt with it (median of 12 cells)."
    )
    assert oracle == (
        "Writing the true residual (oracle) closes 23 % of the gap in a cell (median over cells), "
        "at layer 14, the best of 2 sets; its KL is below the unedited prompt's (by the median "
        "paired difference)."
    )
    assert cached.startswith("Writing h_BB + Δ_X + Δ_Y (cached) closes -5 % of the gap in a cell (")
    assert "8+14, the best of 3 sets; its KL is above the unedited prompt's (by " in cached


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        (
            ACROSS,
            "; it is undecided whether its KL is below the unedited prompt's (by the median "
            "paired difference).",
        ),
        (UNKNOWN, "; its KL is below the unedited prompt's in 3 of 4 cells."),
    ],
)
def test_an_injection_that_is_not_told_apart(ends: tuple[float, float], verdict: str) -> None:
    found = said(
        "inject",
        injection(oracle=[0.1]),
        [contrast_row("oracle", "host", "8", ends, n=4, lower=3)],
    )
    assert len(found) == 2
    assert found[1].endswith(verdict)


def test_an_injection_of_one_cell() -> None:
    found = said(
        "inject",
        [
            summary_row("host", "none", 2.0, n=1, share=0.0, of="gap_closed"),
            summary_row("oracle", "8", 1.5, n=1, share=0.25, of="gap_closed"),
        ],
        [contrast_row("oracle", "host", "8", UNKNOWN, n=1, lower=1)],
    )
    assert found[1:] == [
        "Writing the true residual (oracle) closes 25 % of the gap in a cell (median over cells), "
        "at layer 8; its KL is below the unedited prompt's in 1 of 1 cell.",
        "1 cell is too few for intervals; expect other cells to differ.",
    ]


def test_a_single_set_has_the_interval_of_its_share_and_the_pooled_one() -> None:
    oracle = summary_row("oracle", "8", 1.5, share=0.25, of="gap_closed", pooled=0.5)
    host = summary_row("host", "none", 2.0, share=0.0, of="gap_closed")
    (_, sentence) = said(
        "inject", [host, oracle], [contrast_row("oracle", "host", "8", ACROSS, margin=0.4)]
    )
    assert sentence == (
        "Writing the true residual (oracle) closes 25 % (15 to 35) of the gap in a cell (median "
        "over cells; pooled 50 %), at layer 8; it is as good as the unedited prompt (within ± 20 % "
        "of the unedited prompt's KL) (by the median paired difference)."
    )


def test_an_injection_without_a_gap_has_none_closed() -> None:
    found = said("inject", injection(oracle=[NAN], cached=[NAN]))
    assert len(found) == 1
    assert found[0].startswith("The prompt without the persona is")


def test_an_injection_that_was_interrupted_at_its_host() -> None:
    assert said("inject", injection()) == [
        "The prompt without the persona is 3.05 nats from the prompt with it (median of 12 cells)."
    ]


# --- steer


def steering(
    *rows: tuple[float, float, float, float], of: str = "recovered", n: int = 12
) -> list[dict[str, object]]:
    """Rows of α, β, median and share, under their control."""
    control = ("bb", "8") if of == "recovered" else ("host", "none")
    return [
        summary_row(*control, 3.0, share=0.0, of=of, n=n, alpha=NAN, beta=NAN),
        *(
            summary_row("steer", "8", median, share=share, of=of, n=n, alpha=alpha, beta=beta)
            for alpha, beta, median, share in rows
        ),
    ]


def test_a_steering_is_told_by_its_ends_and_its_lowest_kl() -> None:
    found = said(
        "steer",
        steering(
            (2.0, 1.0, 1.234, 0.5),  # not in order
            (0.0, 1.0, 0.9, 0.7),
            (1.0, 1.0, 0.25, 0.88),
            (1.5, 1.0, 0.3, 0.99),
            (0.0, 0.0, 3.0, 0.0),
            (1.0, 0.0, 4.0, -0.3),
            (2.0, 0.0, 5.0, -0.6),
        ),
    )
    assert found == [
        "With β = 1 the median KL over cells is 0.9 at α = 0 and 1.23 at α = 2 nats, lowest at "
        "α = 1 (0.25); there the vector recovers 88 % of what h_BB loses (median over cells), the "
        "best of 4 factors α.",
        "With β = 0 the median KL over cells is 3 at α = 0 and 5 at α = 2 nats, lowest at α = 0 "
        "(3); there the vector recovers 0 % of what h_BB loses (median over cells), the best of 3 "
        "factors α.",
    ]


def test_a_steering_into_the_prompt_without_the_persona() -> None:
    (sentence,) = said(
        "steer",
        steering((0, 1, 2, 0.1), (1, 1, 1.5, 0.25), (2, 1, 1.75, 0.2), of="gap_closed"),
    )
    assert sentence.endswith(
        ", lowest at α = 1 (1.5); there the vector closes 25 % of the gap to the prompt with the "
        "persona (median over cells), the best of 3 factors α."
    )


def test_a_share_belongs_to_a_named_factor() -> None:
    """Of two factors the share is that of the one with the lower KL, and has to say so."""
    (sentence,) = said("steer", steering((0.0, 1.0, 0.5, 0.8), (1.0, 1.0, 1.0, 0.6)))
    assert "80 % of what h_BB loses" in sentence
    assert "lowest at α = 0 (0.5)" in sentence


def test_a_single_factor() -> None:
    found = said("steer", steering((1.0, 0.5, 0.25, 0.88), n=3))
    assert found == [
        "With β = 0.5 the median KL over cells is 0.25 at α = 1 nats; there the vector recovers "
        "88 % of what h_BB loses (median over cells).",
        "3 cells are too few for intervals; expect other cells to differ.",
    ]


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        (BELOW, "costs less than leaving Δ_X out (α = 0)"),
        (ACROSS, "is undecided against leaving Δ_X out (α = 0)"),
        ((-0.03, 0.01), "is as good as leaving Δ_X out (α = 0) (within ± 3 % of h_BB's KL)"),
    ],
)
def test_a_steering_is_set_against_no_persona(ends: tuple[float, float], verdict: str) -> None:
    (sentence,) = said(
        "steer",
        steering((0, 1, 2, 0.1), (1, 1, 1.5, 0.25)),
        [contrast_row("steer", "alpha_0", "8", ends, margin=0.09, alpha=1.0, beta=1.0)],
    )
    assert sentence.endswith(f"; it {verdict} (by the median paired difference).")


def test_a_steering_with_nothing_to_recover_names_no_share() -> None:
    (sentence,) = said("steer", steering((0, 1, 1e-6, NAN), (1, 1, 2e-6, NAN), (2, 1, 0, NAN)))
    assert "recovers" not in sentence
    assert "there" not in sentence
    assert sentence.endswith("lowest at α = 2 (0).")


def test_a_steering_that_was_interrupted_at_its_control() -> None:
    assert said("steer", steering()) == []


# --- markers


def markers_table(counts: Mapping[tuple[str, str], Sequence[int]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "persona": f"p{cell}",
                "task": "t",
                "condition": condition,
                "position": "none" if layers == "none" else "p_last",
                "layers": layers,
                "any": count > 0,
                "distinct": count,
                "hits": "",
            }
            for (condition, layers), counted in counts.items()
            for cell, count in enumerate(counted)
        ]
    )


def said_of_markers(counts: Mapping[tuple[str, str], Sequence[int]]) -> list[str]:
    table = markers_table(counts)
    return experiment_named("markers").findings(
        {
            "markers": table,
            "summary": marker_summary(table),
            "contrasts": marker_contrasts(table),
        },
    )


def test_markers_are_counted_and_compared() -> None:
    found = said_of_markers(
        {
            ("clean", "none"): [2, 2, 2, 2, 2, 0],
            ("additive", "8"): [2, 2, 2, 2, 2, 0],
            ("additive", "14"): [3, 3, 3, 3, 3, 1],
            ("remove_x", "8"): [1, 1, 1, 1, 1, 0],
            ("bare", "none"): [0] * 6,
        }
    )
    assert found == [
        "Of 6 texts, a marker of the persona occurs in 5 under clean, 5 under additive at 8, 6 "
        "under additive at 14, 5 under remove_x at 8 and 0 under bare.",
        "There are fewer distinct markers, in the mean over texts, under remove_x at 8 than clean, "
        "remove_x at 8 than additive and bare than clean.",
        "There are more distinct markers, in the mean over texts, under additive at 14 than clean.",
        "It is undecided whether the mean number of distinct markers differs between additive at 8 "
        "and clean.",
    ]


def test_markers_of_few_cells_are_counted_alone() -> None:
    assert said_of_markers({("clean", "none"): [2], ("bare", "none"): [0]}) == [
        "Of 1 texts, a marker of the persona occurs in 1 under clean and 0 under bare.",
        "1 cell is too few for intervals; expect other cells to differ.",
    ]


def test_markers_of_a_run_that_was_interrupted_at_the_clean_texts() -> None:
    assert said_of_markers({("clean", "none"): [2, 2, 2, 2, 2, 0]}) == [
        "Of 6 texts, a marker of the persona occurs in 5 under clean."
    ]


def test_markers_of_an_interrupted_run_are_compared_where_cells_suffice() -> None:
    found = said_of_markers(
        {
            ("clean", "none"): [2, 2, 2, 2, 2, 2],
            ("additive", "8"): [1, 1, 1, 1, 1],
            ("remove_x", "8"): [0, 0],
        }
    )
    assert found[1:] == [
        "There are fewer distinct markers, in the mean over texts, under additive at 8 than clean."
    ]


def test_a_count_of_fewer_texts_says_of_how_many() -> None:
    """Five of five is no loss against six of six."""
    sentence = said_of_markers(
        {("clean", "none"): [1, 1, 1, 1, 1, 1], ("additive", "8"): [1, 1, 1, 1, 1]}
    )[0]
    assert re.search(r"\bof 5\b", sentence)


# --- capture


def geometry(
    cells: int, normed: Mapping[tuple[str, int], float] | None = None, start: float = 0.5
) -> pd.DataFrame:
    """Two positions at two layers; Inter is 40, 50, 60 and 70 % of Δ_XY at the sites in turn.

    As runs of earlier versions left it: without controls.
    """
    sites = [("p_last", 8), ("p_last", 14), ("g1", 8), ("g1", 14)]
    rows = []
    for cell in range(cells):
        for number, (position, layer) in enumerate(sites):
            spread = (cell - (cells - 1) / 2) / 100
            row: dict[str, object] = {
                "persona": f"p{cell}",
                "task": "t",
                "position": position,
                "layer": layer,
                "cos_xy_sum": start + number / 10 + spread,
                "inter_over_xy": 0.4 + number / 10 + spread,
            }
            if normed is not None:
                change = normed[position, layer]
                row["inter_over_xy_normed"] = 0.4 + number / 10 + spread + change
            rows.append(row)
    return pd.DataFrame(rows)


WITHOUT_CONTROLS = (
    "cos(Δ_XY, Δ_X+Δ_Y) is 0.50 to 0.80, and ‖Inter‖ is 40 to 70 % of ‖Δ_XY‖ (medians over cells, "
    "from the lowest site to the highest). Without Δ_Y alone beside it that does not tell whether "
    "the effects add up."
)

SITES = [("p_last", 8), ("p_last", 14), ("g1", 8), ("g1", 14)]


def controlled(
    gains: Sequence[float], others: Sequence[float] | None, personas: int = 8, tasks: int = 5
) -> pd.DataFrame:
    """Cosines of 0.9 with Δ_Y alone, and what Δ_X and Δ_X′ add to them at each of the `SITES`.

    Cells differ by 0.01 from one another in both; what is left falls by as much as the cosine
    rises.
    """
    rows = []
    for cell in range(personas * tasks):
        luck = 0.01 * (cell % 7 - 3) / 3
        for number, (position, layer) in enumerate(SITES):
            row = {
                "persona": f"p{cell // tasks}",
                "task": f"t{cell % tasks}",
                "position": position,
                "layer": layer,
                "cos_xy_sum": 0.9 + gains[number] + luck,
                "cos_xy_y": 0.9,
                "inter_over_xy": 0.4 - gains[number] - luck,
                "rest_y": 0.4,
            }
            if others is not None:
                row["cos_xy_other"] = 0.9 + others[number] - luck
            rows.append(row)
    return pd.DataFrame(rows)


COUNTED = "Sites are counted by 95 % intervals that hold for all of them at once."
CAUTION = (
    "Where adding Δ_X does not raise it, a high cosine with the sum does not show that the effects "
    "add up. "
)


def test_a_capture_sets_the_sum_beside_the_task_alone_and_another_persona() -> None:
    table = controlled([0.05, 0.0, -0.05, 0.04], [-0.02, 0.0, -0.05, 0.04])
    assert experiment_named("capture").findings({"geometry": table}) == [
        "cos(Δ_XY, Δ_X+Δ_Y) is 0.85 to 0.95, and cos(Δ_XY, Δ_Y) without Δ_X is 0.90; Δ_X+Δ_Y "
        "leaves 35 to 45 % of ‖Δ_XY‖, and Δ_Y alone 40 % (medians over cells, from the lowest site "
        "to the highest).",
        "Adding Δ_X to Δ_Y changes the cosine by a median of -0.050 to +0.050 (up at 2 of 4 sites, "
        "down at 1, undecided at 1) and what is left by a median of -5.0 to +5.0 points (up at 1 "
        "of 4 sites, down at 2, undecided at 1). Adding another persona's Δ_X′, the control, "
        "changes the cosine by a median of -0.050 to +0.040 (up at 1 of 4 sites, down at 2, "
        "undecided at 1); with Δ_X it is above that with Δ_X′ by a median of +0.000 to +0.070 (up "
        f"at 1 of 4 sites, down at 0, undecided at 3). {CAUTION}{COUNTED}",
    ]


def test_a_capture_whose_persona_helps_everywhere_needs_no_caution() -> None:
    _, gain = experiment_named("capture").findings(
        {"geometry": controlled([0.05, 0.04, 0.05, 0.04], [0.0] * 4)}
    )
    assert "the cosine by a median of +0.040 to +0.050 (up at 4 of 4 sites" in gain
    assert CAUTION not in gain
    assert gain.endswith(COUNTED)


@pytest.mark.parametrize("value", [0.0, 4e-6])
def test_a_gain_of_nothing_or_of_rounding_is_no_gain(value: float) -> None:
    table = controlled([value] * 4, None)
    table["cos_xy_sum"] = table["cos_xy_y"] + value
    _, gain = experiment_named("capture").findings({"geometry": table})
    assert "by a median of +0.000 (up at 0 of 4 sites, down at 0, undecided at 4)" in gain
    assert CAUTION in gain
    assert "another persona" not in gain


def test_few_cells_give_gains_without_verdicts() -> None:
    table = controlled([0.05, 0.0, -0.05, 0.04], [0.0] * 4, personas=2, tasks=2)
    _, gain = experiment_named("capture").findings({"geometry": table})
    assert "the cosine by a median of -0.0" in gain
    assert "sites" not in gain
    assert "add up" not in gain


def test_a_capture_whose_controls_have_no_numbers() -> None:
    table = geometry(7).assign(cos_xy_y=NAN, rest_y=NAN, cos_xy_other=NAN)
    assert experiment_named("capture").findings({"geometry": table}) == [WITHOUT_CONTROLS]


def test_no_capture_says_that_the_effects_add_up() -> None:
    assert experiment_named("capture").findings({"geometry": geometry(7)}) == [WITHOUT_CONTROLS]


def test_a_capture_tells_what_the_norm_absorbs() -> None:
    changes = {("p_last", 8): -0.25, ("p_last", 14): 0.0, ("g1", 8): 0.5, ("g1", 14): -0.25}
    found = experiment_named("capture").findings({"geometry": geometry(7, changes)})
    assert found == [
        WITHOUT_CONTROLS,
        "The layer's input norm, which the paper supposes to absorb part of Inter, makes "
        "‖Inter‖/‖Δ_XY‖ smaller at 2 of 4 sites and larger at 1 (median change -0.125).",
    ]


def test_a_change_that_goes_either_way_is_neither_smaller_nor_larger() -> None:
    table = geometry(8, dict.fromkeys([("p_last", 8), ("p_last", 14), ("g1", 8), ("g1", 14)], 0.0))
    sign = table["persona"].map(lambda name: 1 if int(name[1:]) % 2 else -1)
    table["inter_over_xy_normed"] = table["inter_over_xy"] + 0.25 * sign
    _, sentence = experiment_named("capture").findings({"geometry": table})
    assert "smaller at 0 of 4 sites and larger at 0 " in sentence


def test_few_cells_say_nothing_about_the_norm() -> None:
    changes = dict.fromkeys([("p_last", 8), ("p_last", 14), ("g1", 8), ("g1", 14)], -0.25)
    found = experiment_named("capture").findings({"geometry": geometry(4, changes)})
    assert found == [WITHOUT_CONTROLS]
    assert len(experiment_named("capture").findings({"geometry": geometry(1)})) == 1


def test_a_capture_with_sites_that_no_continuation_reached() -> None:
    changes = dict.fromkeys([("p_last", 8), ("p_last", 14), ("g1", 8), ("g1", 14)], -0.25)
    table = geometry(7, changes)
    measures = ["cos_xy_sum", "inter_over_xy", "inter_over_xy_normed"]
    table.loc[table["position"] == "g1", measures] = NAN
    first, second = experiment_named("capture").findings({"geometry": table})
    assert first == WITHOUT_CONTROLS.replace("0.80", "0.60").replace("70 %", "50 %")
    assert "smaller at 2 of " in second
    assert "nan" not in second


# --- all of them


def test_missing_and_empty_tables_say_nothing() -> None:
    for command in NAMES:
        assert experiment_named(command).findings({}) == []
        assert (
            experiment_named(command).findings(
                {"geometry": pd.DataFrame(columns=["persona", "task"])}
            )
            == []
        )
    assert experiment_named("substitute").findings({"geometry": geometry(7)}) == []


@pytest.mark.parametrize("command", ["substitute", "steer", "capture"])
def test_numbers_that_are_missing_are_not_printed(command: str) -> None:
    """As a position leaves them that no continuation reaches."""
    if command == "capture":
        table = geometry(1)
        table[["cos_xy_sum", "inter_over_xy"]] = NAN
        found = experiment_named(command).findings({"geometry": table})
    else:
        rows = {
            "substitute": [("additive", NAN), ("bb", NAN), ("by", NAN)],
            "steer": [("bb", NAN), ("steer", 0.0), ("steer", 1.0), ("steer", 2.0)],
        }[command]
        summary = [
            summary_row(name, "8", NAN, n=0, alpha=alpha, beta=NAN if name == "bb" else 1.0)
            for name, alpha in rows
        ]
        contrast = contrast_row(rows[1][0], rows[0][0], "8", UNKNOWN, n=0, lower=0)
        found = said(command, summary, [contrast])
    assert not [sentence for sentence in found if "nan" in sentence.lower()]


def run_tables(command: str) -> dict[str, pd.DataFrame]:
    """Small tables as a run makes them, from KLs that differ by condition, layer and cell."""
    edits: dict[str, list[tuple[str, str, str, float, float]]] = {
        "substitute": [
            (condition, "XY", layers, NAN, NAN)
            for condition in ("additive", "bb", "by", "clean")
            for layers in ("8", "14")
        ],
        "inject": [
            ("host", "BY", "none", NAN, NAN),
            *((name, "BY", lay, NAN, NAN) for name in ("oracle", "cached") for lay in ("8", "14")),
        ],
        "steer": [
            ("bb", "XY", "8", NAN, NAN),
            *(("steer", "XY", "8", alpha, beta) for beta in (1.0, 0.0) for alpha in (0.0, 1.0, 2)),
        ],
    }
    names = ["condition", "host", "layers", *(["alpha", "beta"] if command == "steer" else [])]
    table = pd.DataFrame(
        [
            {
                "persona": f"p{cell}",
                "task": "t",
                "position": "p_last",
                **dict(zip(names, edit, strict=False)),
                "kl": 0.25 * (1 + (3 * number + cell) % 7) + cell / 16,
                "n_tokens": 10,
            }
            for cell in range(7)
            for number, edit in enumerate(edits[command])
        ]
    )
    if command == "inject":
        host = table[table["condition"] == "host"].set_index("persona")["kl"]
        table["gap_closed"] = 1 - table["kl"] / table["persona"].map(host)
    return {"kl": table, "summary": kl_summary(table), "contrasts": contrasts(table)}


@pytest.mark.parametrize("command", ["substitute", "inject", "steer"])
def test_the_tables_on_disk_say_the_same(command: str, tmp_path: Path) -> None:
    tables = run_tables(command)
    found = experiment_named(command).findings(tables)
    assert found
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    assert experiment_named(command).findings(
        {name: read_table(tmp_path / f"{name}.csv") for name in tables}
    ) == (found)


@pytest.mark.parametrize("command", ["inject", "steer"])
def test_the_best_of_several_has_an_interval_that_knows_of_the_choice(command: str) -> None:
    tables = run_tables(command)
    several = {"inject": "2 sets", "steer": "3 factors α"}[command]
    words = f", the best of {several}, an interval that allows for the choice: "
    told = [each for each in experiment_named(command).findings(tables) if "the best of" in each]
    assert told
    for sentence in told:
        low, high = re.search(rf"{re.escape(words)}(-?\d+) to (-?\d+) %", sentence).groups()  # type: ignore[union-attr]
        assert int(low) < int(high) <= 100
    without = {name: table for name, table in tables.items() if name != "kl"}
    for sentence in experiment_named(command).findings(without):
        assert "an interval" not in sentence


def test_the_interval_of_the_best_set_is_that_of_the_draws() -> None:
    tables = run_tables("inject")
    edits, _, shares = drawn_kls(tables["kl"])
    cached = np.flatnonzero(edits["condition"] == "cached")
    best = best_of(shares.take(cached))
    assert best is not None
    ends = " to ".join(str(round(100 * min(end, 1.0))) for end in (best.low, best.high))
    sentence = experiment_named("inject").findings(tables)[2]
    assert f"at layer {edits['layers'][cached[best.column]]}, the best of 2 sets" in sentence
    assert f"the choice: {ends} %;" in sentence


def cells(personas: int, tasks: int) -> dict[str, pd.DataFrame]:
    rows = [(f"p{i}", f"t{j}") for i in range(personas) for j in range(tasks)]
    return {"kl": pd.DataFrame(rows, columns=["persona", "task"])}


@pytest.mark.parametrize(
    ("levels", "sentence"),
    [
        (
            (8, 12),
            "Intervals and verdicts allow for other personas and tasks (8 personas and 12 tasks, "
            "both drawn); other models may differ.",
        ),
        (
            (8, 3),
            "Intervals and verdicts are of these 3 tasks only, too few to speak of others "
            "(8 personas and 3 tasks, both drawn).",
        ),
        (
            (4, 1),
            "Intervals and verdicts are of these 4 personas and this 1 task only, too few to speak "
            "of others (4 personas and 1 task, personas drawn).",
        ),
    ],
)
def test_the_caveat_says_of_which_levels_a_run_speaks(
    levels: tuple[int, int], sentence: str
) -> None:
    assert caveat(cells(*levels)) == sentence
    assert caveat({}) == "Intervals and verdicts are over the cells of this run."


def test_ties_are_counted() -> None:
    assert list(ties([0.5, 0.25, None])) == []
    assert list(ties([0.0, 0.25, None, 0.0])) == [
        "In 2 of 3 cells a token of the clean continuation ties with another (their logits are "
        "equal), and the one with the lower id was taken."
    ]


@pytest.mark.parametrize("command", ["substitute", "inject", "steer"])
def test_a_run_can_be_interrupted_after_any_row(command: str) -> None:
    """Edits come one after the other, each for every cell."""
    whole = run_tables(command)["kl"]
    names = ["condition", "layers", *whole.filter(["alpha", "beta"])]
    edit = whole.groupby(names, sort=False, dropna=False).ngroup()
    order = edit.sort_values(kind="stable").index
    for rows in (*range(1, 16), *range(16, len(whole), 5)):
        table = whole.loc[sorted(order[:rows])]
        tables = {"kl": table, "summary": kl_summary(table), "contrasts": contrasts(table)}
        for sentence in experiment_named(command).findings(tables):
            assert "nan" not in sentence.lower()


def test_many_layers_are_put_in_ranges() -> None:
    layers = [*range(8, 16), 20, 21]
    summary = [
        row
        for layer in layers
        for row in (
            summary_row("additive", str(layer), 0.2, share=layer / 100),
            summary_row("bb", str(layer), 1.0, share=0.0),
        )
    ]
    against = [
        contrast_row("additive", "by", str(layer), BELOW if layer < 15 else ABOVE)
        for layer in layers
    ]
    (sentence,) = said("substitute", summary, against)
    assert sentence == (
        "At p_last the additive vector recovers between 8 % (layer 8) and 21 % (layer 21) of what "
        "writing h_BB loses (medians over cells); it costs less than leaving the persona out (by) "
        "at layers 8 to 14 and costs more than it at layers 15, 20 and 21 (by medians of paired "
        "differences)."
    )
