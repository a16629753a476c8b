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
from persona_nnsight.analysis.kl_tables import KL_FLOOR, NO_PERSONA, records
from persona_nnsight.method.conditions import HOST
from persona_nnsight.method.sites import NO_LAYERS

#: Belongs below the sentences of a run: its cells are no sample of all cells.
CAVEAT = (
    "Intervals and verdicts are over these cells, which share personas and tasks; others may "
    "differ by more."
)

#: Where the median KL of `bb` is below this, in nats, even the baseline's residual costs little.
NEARLY_FREE = 0.1

#: More shares than this are not listed one by one.
_MOST_SHARES = 6

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
            clauses.insert(0, f"recovers {_shares(shares)} of what writing h_BB loses")
        said = [f"At {position} the additive vector {'; it '.join(clauses)}."] if clauses else []
        neither = at[at["condition"] == "bb"].set_index("layers")["median"]
        free = neither[neither < NEARLY_FREE]
        if len(free):
            where = _layers(free.index) if said else f"{position}, {_layers(free.index)},"
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
        groups.setdefault(_side(row), []).append(row["layers"])
    verdicts = {-1: "costs less than", 1: "costs more than", 0: "cannot be told apart from"}
    told = [
        f"{verdict} {'it' if number else _CONTROLS[control]} at {_layers(groups[side])}"
        for number, (side, verdict) in enumerate(
            (side, verdict) for side, verdict in verdicts.items() if side in groups
        )
    ]
    return _listed(told) if told else ""


def _injection(summary: pd.DataFrame, contrasts: pd.DataFrame) -> Iterable[str]:
    rows = records(summary)
    host = next((row for row in rows if row["condition"] == HOST), None)
    if host is None:  # a table that was cut by hand
        return
    yield (
        f"The prompt without the persona is {host['median']:.2f} nats from the prompt with it "
        f"(median of {_cells(host['n'])})."
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
            f"{what} closes at most {_share(best, 'gap_closed')} of that gap, at layer "
            f"{best['layers']}{of_sets}; its KL {_compared(against)}."
        )
    yield from _few_cells(summary)


def _compared(contrast: Mapping[str, Any]) -> str:
    if math.isnan(contrast["lo"]):
        n = contrast["n"]
        return f"is below the unedited prompt's in {contrast['lower']} of {_cells(n)}"
    verdict = {-1: "is below", 1: "is above", 0: "cannot be told apart from"}[_side(contrast)]
    return f"{verdict} the unedited prompt's"


def _steering(summary: pd.DataFrame, contrasts: pd.DataFrame) -> Iterable[str]:
    share, what = "recovered", "the vector recovers {} of what h_BB loses"
    if "gap_closed" in summary:
        share, what = "gap_closed", "the vector closes {} of the gap to the prompt with the persona"
    steered = summary[(summary["condition"] == "steer") & summary["median"].notna()]
    for beta, found in steered.groupby("beta", sort=False):
        rows = sorted(records(found), key=lambda row: float(row["alpha"]))
        ends = [f"{row['median']:.3g} at α = {row['alpha']:g}" for row in (rows[0], rows[-1])]
        sentence = f"With β = {beta:g} the median KL is {_listed(list(dict.fromkeys(ends)))} nats"
        best = min(rows, key=lambda row: float(row["median"]))
        if len(rows) > 1:
            sentence += f", lowest at α = {best['alpha']:g} ({best['median']:.3g})"
        if not math.isnan(best[share]):
            sentence += f"; there {what.format(_share(best, share))}"
        without = [
            row
            for row in records(contrasts.dropna(subset=["lo"]))
            if (row["control"], row["alpha"], row["beta"]) == (NO_PERSONA, best["alpha"], beta)
        ]
        for row in without:
            verdict = {-1: "costs less than", 1: "costs more than"}.get(_side(row))
            sentence += f", and {verdict or 'cannot be told apart from'} leaving Δ_X out (α = 0)"
        yield sentence + "."
    yield from _few_cells(summary)


def _markers(summary: pd.DataFrame, contrasts: pd.DataFrame) -> Iterable[str]:
    n = summary["n"].max()
    counts = []
    for row in records(summary):
        of = "" if row["n"] == n else f" of {row['n']}"  # the run was interrupted
        counts.append(f"{row['any']}{of} under {_edit(row)}")
    yield f"Of {n} texts, a marker of the persona occurs in {_listed(counts)}."
    told: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for row in records(contrasts[contrasts["measure"] == "distinct"].dropna(subset=["lo"])):
        told[_side(row)].append(f"{_edit(row)} {{}} {row['control']}")
    for side, word in ((-1, "fewer"), (1, "more")):
        if told[side]:
            pairs = _listed([pair.format("than") for pair in told[side]])
            yield f"There are {word} distinct markers under {pairs}."
    if told[0]:
        pairs = _listed([pair.format("from") for pair in told[0]])
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
        yield f"{_cells(n)} {verb} too few for intervals; expect other cells to differ."


def _cells(n: int) -> str:
    return f"{n} cell{'' if n == 1 else 's'}"


def _shares(shares: pd.Series[float]) -> str:
    """``88 % (layer 8), 89 % (layers 12 and 16)``, layers in order; of many, the ends alone."""
    percents = shares.map(lambda share: f"{round(100 * share)} %")
    found = [
        f"{percent} ({_layers(layers.index)})"
        for percent, layers in percents.groupby(percents, sort=False)
    ]
    if len(found) <= _MOST_SHARES:
        return ", ".join(found)
    ends = (str(shares.idxmin()), str(shares.idxmax()))
    low, high = (f"{percents[layer]} (layer {layer})" for layer in ends)
    return f"between {low} and {high}"


def _share(row: Mapping[str, Any], name: str) -> str:
    """``23 % (18 to 30)``: a share with its interval, where it has one."""
    if math.isnan(row[f"{name}_lo"]):
        return f"{round(100 * row[name])} %"
    share, low, high = (round(100 * row[f"{name}{end}"]) for end in ("", "_lo", "_hi"))
    return f"{share} % ({low} to {high})"


def _side(contrast: Mapping[str, Any]) -> int:
    """-1 where the interval of a difference lies below 0, 1 above, 0 around it.

    Differences below `KL_FLOOR` are rounding.
    """
    return -1 if contrast["hi"] < -KL_FLOOR else 1 if contrast["lo"] > KL_FLOOR else 0


def _layers(names: Iterable[str]) -> str:
    """``layer 8``, ``layers 8 and 12``, ``layers 4 to 9 and 12``."""
    runs: list[list[str]] = []
    for name in names:
        before = runs[-1][-1] if runs else ""
        follows = before.isdigit() and name == str(int(before) + 1)
        runs[-1].append(name) if follows else runs.append([name])
    found: list[str] = []
    for run in runs:
        found += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
    several = len(found) > 1 or " to " in found[0]
    return f"layer{'s' if several else ''} {_listed(found)}"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
