"""The command line: which architectures, and the page that their verdicts are on."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from architectures.building import architectures
from architectures.sweep import sweep
from architectures.verdict import FAILURES, Verdict


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge architectures, and compare the page with what came out.

    Raises:
        SystemExit: one fails, or the page says otherwise.
    """
    options = _parser().parse_args(arguments)
    only = {name for name in options.only.split(",") if name}
    if unknown := only - {each.model_type for each in architectures()}:
        raise SystemExit(f"transformers has no {', '.join(sorted(unknown))}.")
    wanted = [each for each in architectures() if not only or each.model_type in only]
    found: list[Verdict] = []
    begun = time.perf_counter()
    for verdict in sweep(wanted, options.workers):
        found.append(verdict)
        what = verdict.architecture
        print(f"{time.perf_counter()-begun:.0f} {what.task:10} {what.model_type:28} {verdict.verdict}  {verdict.why}", flush=True)
        if options.csv:
            _write(options.csv, found)


def _write(path: Path, found: Sequence[Verdict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "model_type", "class", "loaded", "verdict", "largest_kl_difference", "why"])
        for verdict in found:
            what = verdict.architecture
            writer.writerow([what.task, what.model_type, what.class_name, verdict.loaded, verdict.verdict, verdict.difference, verdict.why])
    with Path("/tmp/sweep-failures.txt").open("w") as file:
        for v in found:
            if v.verdict in FAILURES:
                a=v.architecture
                file.write(f"===== {a.task} {a.model_type} {a.class_name} loaded={v.loaded}: {v.verdict}: {v.why}\n{v.trace[-1800:]}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="architectures", description="Every decoder that transformers can run, against the oracle."
    )
    add = parser.add_argument
    add("--only", default="", metavar="TYPES", help="model types, with commas between")
    add("--workers", type=int, default=1, help="processes")
    add("--csv", type=Path, metavar="PATH", help="keep the verdicts")
    return parser
