"""The command line: which architectures, and the page that has their verdicts."""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from architectures.building import architectures
from architectures.page import PAGE, disagreements, read_page, rows_of, write_page
from architectures.sweep import sweep
from architectures.verdict import FAILURES, ORDER, Verdict


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge architectures, and compare the page with what came out, or write it.

    Raises:
        SystemExit: one is wrong or ends in a traceback, or the page says otherwise.
    """
    options = _parser().parse_args(arguments)
    every = architectures()
    if unknown := options.only - {each.model_type for each in every}:
        raise SystemExit(f"transformers has no model type {', '.join(sorted(unknown))}.")
    wanted = [each for each in every if not options.only or each.model_type in options.only]
    found: list[Verdict] = []
    for verdict in sweep(wanted, options.workers):
        found.append(verdict)
        own = verdict.architecture
        print(f"{own.task:10} {own.model_type:28} {verdict.verdict:13}  {verdict.told}", flush=True)
        if verdict.trace and verdict.verdict in FAILURES:
            print(verdict.trace, flush=True)
        if options.csv:
            _keep(options.csv, found)
    counts = Counter(verdict.verdict for verdict in found)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict]))
    rows = rows_of(found)
    if options.write:
        write_page({**({} if len(wanted) == len(every) else read_page()), **rows})
    others = disagreements(read_page(), rows, everything=wanted == every)
    if others:
        print(f"{PAGE.name} says otherwise:", *others, sep="\n  ")
    if others or any(counts[verdict] for verdict in FAILURES):
        raise SystemExit(1)


def _keep(path: Path, found: Sequence[Verdict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "model_type", "class", "loaded", "verdict", "difference", "told"])
        for verdict in found:
            own = verdict.architecture
            named = own.task, own.model_type, own.class_name, verdict.loaded
            writer.writerow([*named, verdict.verdict, verdict.difference, verdict.told])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="architectures", description="Every decoder of transformers, tiny, against the oracle."
    )
    add = parser.add_argument
    add("--only", type=_names, default=frozenset(), metavar="TYPES", help="these model types")
    add("--workers", type=int, default=1, metavar="N", help="processes")
    add("--write", action="store_true", help=f"write docs/{PAGE.name}")
    add("--csv", type=Path, metavar="PATH", help="keep the verdicts")
    return parser


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(","))
