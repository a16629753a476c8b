"""The tables, and what has to be said below them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import Agreement, Row
from benchmarks.curves import Point
from benchmarks.load import Load
from benchmarks.procedure import STEP, full_forwards
from benchmarks.soak import Round
from benchmarks.startup import Startup

#: Wide enough for the main table where there is no terminal.
WIDTH = 200


def print_facts(console: Console, facts: Mapping[str, object]) -> None:
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), soft_wrap=True)


def print_rows(console: Console, rows: Sequence[Row], machine_rate: float) -> None:
    """The main table; `machine_rate` is the machine's own, in FLOP/s."""
    table = _table(
        "",
        "ours s",
        "published s",
        "ratio",
        "tokens × layers",
        "floor",
        "× floor",
        "GFLOP ours",
        "floor",
        "published",
        "GFLOP/s",
        "of machine",
        "peak MB",
        "largest difference",
        "jobs",
        "kB sent",
    )
    for row in rows:
        rate = row.flops["ours"] / row.ours.seconds
        table.add_row(
            row.name,
            f"{row.ours.seconds:.2f}",
            f"{row.published_seconds:.1f}",
            f"{row.ratio:.1f}",
            f"{row.ours.work.token_layers:,}",
            f"{row.floor.token_layers:,}",
            f"{row.ours.work.token_layers / row.floor.token_layers:.2f}",
            *(f"{row.flops[name] / 1e9:,.1f}" for name in ("ours", "floor", "published")),
            f"{rate / 1e9:,.1f}",
            f"{rate / machine_rate:.0%}",
            f"{row.ours.peak_bytes / 1e6:,.0f}",
            difference(row.agreement),
            str(len(row.jobs)),
            f"{sum(row.jobs) / 1e3:,.0f}",
        )
    console.print(table)
    console.print(f"This machine's matrix products: {machine_rate / 1e9:,.1f} GFLOP/s.")
    console.print(
        "GFLOP: two for a weight of a linear map and a token; attention's own products are left "
        "out.\nPeak: beyond what was held before the run, the weights for one.\nPublished s: mean "
        "time of each kind of forward on the subset, times the number of them:",
        soft_wrap=True,
    )
    for row in rows:
        console.print(f"  {row.name}: {scaling(row)}", soft_wrap=True)


def difference(agreement: Agreement) -> str:
    """The largest difference from the procedure's numbers, and how many were compared."""
    words = []
    if agreement.kls:
        words.append(f"KL {agreement.kl:.1e} of {agreement.kls}")
    if not math.isnan(agreement.residual):
        words.append(f"residual {agreement.residual:.1e}")
    if agreement.texts[1]:
        words.append("texts {}/{} equal".format(*agreement.texts))
    return ", ".join(words)


def scaling(row: Row) -> str:
    """What the procedure was run on, and what the whole plan needs of it."""
    subset = f"{len(row.subset.cells)} of {row.n_cells} cells"
    if row.n_edits:
        subset += f", {len(row.subset.edits)} of {row.n_edits} edits"
    equal, of = row.agreement.continuations
    continuations = f"; {equal} of {of} continuations equal ours" if of else ""
    counts = [
        f"{full_forwards(counts):,} full forwards and {counts[STEP].forwards:,} steps"
        for counts in (row.timed, row.whole)
    ]
    return f"{counts[0]} run ({subset}), {counts[1]} for all{continuations}"


def print_startup(console: Console, found: Sequence[Startup]) -> None:
    table = _table("start-up", "seconds", "to be below")
    for each in found:
        table.add_row(each.what, f"{each.seconds:.2f}", f"{each.limit:.1f}")
    console.print(table)


def print_curves(console: Console, found: Sequence[Point]) -> None:
    table = _table(
        "cost curve",
        "",
        "seconds",
        "tokens × layers",
        "floor",
        "patched, floor",
        "head rows",
        "floor",
        "GFLOP",
        "GFLOP/s",
    )
    before = None
    for point in found:
        if before not in (None, point.curve):
            table.add_section()
        before = point.curve
        table.add_row(
            point.curve.replace("_", " "),
            f"{point.value:,}",
            f"{point.seconds:.3f}",
            f"{point.work.token_layers:,}",
            f"{point.floor.token_layers:,}",
            f"{point.patched.token_layers:,}",
            f"{point.work.head_rows:,}",
            f"{point.floor.head_rows:,}",
            f"{point.flops / 1e9:,.2f}",
            f"{point.flops / point.seconds / 1e9:,.1f}",
        )
    console.print(table)


def print_loads(console: Console, found: Sequence[Load]) -> None:
    table = _table("load", "cells", "seconds", "peak MB", "parts on disk")
    for load in found:
        table.add_row(
            load.what,
            f"{load.cells:,}",
            f"{load.seconds:.1f}",
            f"{load.peak_bytes / 1e6:,.0f}",
            f"{load.parts:,}",
        )
    console.print(table)


def print_rounds(console: Console, found: Sequence[Round]) -> None:
    """Some of the rounds, from the first to the last."""
    table = _table("rounds", "seconds", "MB", "files", "threads", "children", "left behind")
    step = max(1, len(found) // 12)
    for each in [*found[:-1:step], *found[-1:]]:
        table.add_row(
            str(each.number),
            f"{each.seconds:.0f}",
            f"{each.bytes / 1e6:,.1f}",
            *map(str, (each.files, each.threads, each.children, each.left)),
        )
    console.print(table)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table
