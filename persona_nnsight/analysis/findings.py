"""What a run's numbers allow one to say, in sentences: a low KL is set against its controls.

Two conditions are told apart when the bootstrap 95 % interval of the median paired difference
leaves out 0. Many sites are compared at once and no correction is made for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from persona_nnsight.analysis.bootstrap import MIN_CELLS, drawn_medians, interval
from persona_nnsight.analysis.columns import records
from persona_nnsight.analysis.kl_tables import NO_PERSONA
from persona_nnsight.analysis.wording import (
    cells_in_words,
    layers_in_words,
    listed,
    share_in_words,
    shares_in_words,
    side_of_zero,
)
from persona_nnsight.method.conditions import HOST
from persona_nnsight.method.sites import NO_LAYERS

#: Belongs below the sentences of a run: its cells are no sample of all cells.
CAVEAT = (
    "Intervals and verdicts are over these cells, which share personas and tasks; others may "
    "differ by more."
)

#: Where the median KL of `bb` is below this, in nats, even the baseline's residual costs little.
NEARLY_FREE = 0.1


_CONTROLS = {"by": "leaving the persona out (by)", "other_x": "another persona's Δ_X (other_x)"}


def findings(command: str, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Sentences about a run.

    Args:
        command: the experiment, such as ``substitute``.
        tables: those of its run directory that it has, by name; ``summary``, ``contrasts`` and
            ``geometry`` are read.
    """
    said: list[str] = []
    summary, contrasts = tables.get("summary"), tables.get("contrasts")
    if summary is not None and contrasts is not None:
        if command == "substitute":
            said += _substitution(summary, contrasts)
        elif command == "inject":
            said += _injection(summary, contrasts)
        elif command == "steer":
            said += _steering(summary, contrasts)
        elif command == "markers":
            said += _markers(summary, contrasts)
    geometry = tables.get("geometry")
    if command == "capture" and geometry is not None and len(geometry):
        said += _geometry(geometry)
    return said


def _substitution(summary: pd.DataFrame, contrasts: pd.DataFrame) -> Iterable[str]:
    for position, at in summary.groupby("position", sort=False):
        additive = at[at["condition"] == "additive"].set_index("layers")
        shares = additive["recovered"].dropna() if "recovered" in additive else pd.Series()
        mine = contrasts[
            (contrasts["position"] == position) & (contrasts["condition"] == "additive")
        ]
        clauses = [verdict for verdict in (_verdicts(mine, c) for c in _CONTROLS) if verdict]
        if len(shares):
            clauses.insert(0, f"recovers {shares_in_words(shares)} of what writing h_BB loses")
        said = [f"At {position} the additive vector {'; it '.join(clauses)}."] if clauses else []
        neither = at[at["condition"] == "bb"].set_index("layers")["median"]
        free = neither[neither < NEARLY_FREE]
        if len(free):
            where = (
                layers_in_words(free.index)
                if said
                else f"{position}, {layers_in_words(free.index)},"
            )
            said.append(
                f"At {where} a low KL is nearly free: even h_BB costs no more than "
                f"{free.max():.2g} nats."
            )
        if said:
            yield " ".join(said)
    yield from _few_cells(summary)


def _verdicts(contrasts: pd.DataFrame, control: str) -> str:
    """How the additive vector compares with a control, layer by layer."""
    groups: dict[int, list[str]] = {}
    for row in records(contrasts[contrasts["control"] == control].dropna(subset=["lo"])):
        groups.setdefault(side_of_zero(row), []).append(row["layers"])
    verdicts = {-1: "costs less than", 1: "costs more than", 0: "cannot be told apart from"}
    told = [
        f"{verdict} {'it' if number else _CONTROLS[control]} at {layers_in_words(groups[side])}"
        for number, (side, verdict) in enumerate(
            (side, verdict) for side, verdict in verdicts.items() if side in groups
        )
    ]
    return listed(told) if told else ""


def _injection(summary: pd.DataFrame, contrasts: pd.DataFrame) -> Iterable[str]:
    rows = records(summary)
    host = next((row for row in rows if row["condition"] == HOST), None)
    if host is None:  # a table that was cut by hand
        return
    yield (
        f"The prompt without the persona is {host['median']:.2f} nats from the prompt with it "
        f"(median of {cells_in_words(host['n'])})."
    )
    for condition, what in (
        ("oracle", "Writing the true residual (oracle)"),
        ("cached", "Writing h_BB + Δ_X + Δ_Y (cached)"),
    ):
        written = [
            row
            for row in rows
            if row["condition"] == condition and not math.isnan(row["gap_closed"])
        ]
        if not written:
            continue
        best = max(written, key=lambda row: float(row["gap_closed"]))
        against = next(
            (
                row
                for row in records(contrasts)
                if row["condition"] == condition and row["layers"] == best["layers"]
            ),
            None,
        )
        if against is None:
            continue
        of_sets = f", the best of {len(written)} sets" if len(written) > 1 else ""
        yield (
            f"{what} closes at most {share_in_words(best, 'gap_closed')} of that gap, at layer "
            f"{best['layers']}{of_sets}; its KL {_compared(against)}."
        )
    yield from _few_cells(summary)


def _compared(contrast: Mapping[str, Any]) -> str:
    if math.isnan(contrast["lo"]):
        n = contrast["n"]
        return f"is below the unedited prompt's in {contrast['lower']} of {cells_in_words(n)}"
    verdict = {-1: "is below", 1: "is above", 0: "cannot be told apart from"}[
        side_of_zero(contrast)
    ]
    return f"{verdict} the unedited prompt's"


def _steering(summary: pd.DataFrame, contrasts: pd.DataFrame) -> Iterable[str]:
    share, what = "recovered", "the vector recovers {} of what h_BB loses"
    if "gap_closed" in summary:
        share, what = "gap_closed", "the vector closes {} of the gap to the prompt with the persona"
    steered = summary[(summary["condition"] == "steer") & summary["median"].notna()]
    for beta, found in steered.groupby("beta", sort=False):
        rows = sorted(records(found), key=lambda row: float(row["alpha"]))
        ends = [f"{row['median']:.3g} at α = {row['alpha']:g}" for row in (rows[0], rows[-1])]
        sentence = f"With β = {beta:g} the median KL is {listed(list(dict.fromkeys(ends)))} nats"
        best = min(rows, key=lambda row: float(row["median"]))
        if len(rows) > 1:
            sentence += f", lowest at α = {best['alpha']:g} ({best['median']:.3g})"
        if not math.isnan(best[share]):
            sentence += f"; there {what.format(share_in_words(best, share))}"
        without = [
            row
            for row in records(contrasts.dropna(subset=["lo"]))
            if (row["control"], row["alpha"], row["beta"]) == (NO_PERSONA, best["alpha"], beta)
        ]
        for row in without:
            verdict = {-1: "costs less than", 1: "costs more than"}.get(side_of_zero(row))
            sentence += f", and {verdict or 'cannot be told apart from'} leaving Δ_X out (α = 0)"
        yield sentence + "."
    yield from _few_cells(summary)


def _markers(summary: pd.DataFrame, contrasts: pd.DataFrame) -> Iterable[str]:
    n = summary["n"].max()
    counts = []
    for row in records(summary):
        of = "" if row["n"] == n else f" of {row['n']}"  # the run was interrupted
        counts.append(f"{row['any']}{of} under {_edit(row)}")
    yield f"Of {n} texts, a marker of the persona occurs in {listed(counts)}."
    told: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for row in records(contrasts[contrasts["measure"] == "distinct"].dropna(subset=["lo"])):
        told[side_of_zero(row)].append(f"{_edit(row)} {{}} {row['control']}")
    for side, word in ((-1, "fewer"), (1, "more")):
        if told[side]:
            pairs = listed([pair.format("than") for pair in told[side]])
            yield f"There are {word} distinct markers under {pairs}."
    if told[0]:
        pairs = listed([pair.format("from") for pair in told[0]])
        yield f"The number of distinct markers does not tell {pairs}."
    yield from _few_cells(summary)


def _edit(row: Mapping[str, Any]) -> str:
    """``clean``, or ``additive at 14``."""
    site = "" if row["layers"] == NO_LAYERS else f" at {row['layers']}"
    return f"{row['condition']}{site}"


def _geometry(table: pd.DataFrame) -> Iterable[str]:
    # Where all prompts are the same so far (p_last at layer 0) there is no effect to speak of.
    if "norm_dxy" in table:
        lengths = table.groupby(["position", "layer"], sort=False)["norm_dxy"]
        table = table[lengths.transform("median") > 0]
    if table["cos_xy_sum"].isna().all():
        return
    medians = table.groupby(["position", "layer"], sort=False)[["cos_xy_sum", "inter_over_xy"]]
    cosines, rest = medians.median()["cos_xy_sum"], medians.median()["inter_over_xy"]
    yield (
        f"cos(Δ_XY, Δ_X+Δ_Y) is {cosines.min():.2f} to {cosines.max():.2f} (1 where the effects "
        f"add up in direction), and ‖Inter‖ is {100 * rest.min():.0f} to {100 * rest.max():.0f} % "
        "of ‖Δ_XY‖."
    )
    if "inter_over_xy_normed" not in table:
        return
    change = table.assign(change=table["inter_over_xy_normed"] - table["inter_over_xy"])
    wide = change.set_index(["persona", "task", "position", "layer"])["change"]
    sites = wide.unstack(["position", "layer"])
    low_end, high_end = interval(drawn_medians(sites.to_numpy(dtype=float)))
    if np.isnan(low_end).all():
        return
    smaller, larger = int((high_end < 0).sum()), int((low_end > 0).sum())
    yield (
        "The layer's input norm, which the paper supposes to absorb part of Inter, makes "
        f"‖Inter‖/‖Δ_XY‖ smaller at {smaller} of {sites.shape[1]} sites and larger at {larger} "
        f"(median change {sites.median().median():+.3f})."
    )


def _few_cells(summary: pd.DataFrame) -> Iterable[str]:
    column = next(name for name in ("median_lo", "distinct_lo") if name in summary)
    n = int(summary["n"].max())
    if n < MIN_CELLS and summary[column].isna().all():
        verb = "is" if n == 1 else "are"
        yield f"{cells_in_words(n)} {verb} too few for intervals; expect other cells to differ."
