"""The command line: which parts, on which model, and the figures as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.comparison import Row, compare
from benchmarks.curves import draw, points
from benchmarks.load import loads
from benchmarks.measure import matrix_rate
from benchmarks.printing import (
    WIDTH,
    print_curves,
    print_facts,
    print_loads,
    print_rounds,
    print_rows,
    print_startup,
)
from benchmarks.procedure import Procedure
from benchmarks.random_models import SHAPES, random_model, texts_of
from benchmarks.soak import soak
from benchmarks.startup import startup
from benchmarks.work import shapes_of
from benchmarks.workloads import ROWS, Grids
from persona_nnsight import Grid, Model, PersonaError, load_model
from persona_nnsight.models.loading import DEFAULT_MODEL, DTYPES

PARTS = ("rows", "startup", "curves")
#: What takes long, and has to be asked for.
MORE_PARTS = ("load", "soak")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for, and print as they are done.

    Raises:
        SystemExit: bad input.
    """
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    try:
        figures = _run(options, console)
    except PersonaError as error:
        raise SystemExit(str(error)) from error
    if options.json:
        text = json.dumps(figures, indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")


def _run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if "rows" in options.parts:
        grids = Grids(Grid.load("short"), Grid.load(options.grid))
        model = _model(options, grids)
        figures["facts"] = _facts(options.shape or options.model, model)
        print_facts(console, figures["facts"])
        rows, rate = _rows(options, model, grids)
        print_rows(console, rows, rate)
        figures["machine_flops_per_second"] = rate
        figures["rows"] = [{**asdict(row), "ratio": row.ratio} for row in rows]
        del model
    if "startup" in options.parts and options.shape is None:
        waits = startup(options.model)
        print_startup(console, waits)
        figures["startup"] = [asdict(each) for each in waits]
    if "curves" in options.parts:
        curve = list(points(device=options.device, dtype=options.dtype))
        print_curves(console, curve)
        figures["curves"] = [asdict(point) for point in curve]
        if options.figure:
            draw(curve, options.figure)
    if "load" in options.parts:
        found = list(loads(options.load))
        print_loads(console, found)
        figures["load"] = [asdict(load) for load in found]
    if "soak" in options.parts:
        rounds = list(soak(options.minutes))
        print_rounds(console, rounds)
        figures["soak"] = [asdict(each) for each in rounds]
    return figures


def _model(options: argparse.Namespace, grids: Grids) -> Model:
    where = {"device": options.device, "dtype": options.dtype}
    if options.shape is None:
        return load_model(options.model, **where)
    texts = texts_of([grids.short, grids.long])
    return random_model(options.shape, SHAPES[options.shape](), texts, **where)


def _rows(options: argparse.Namespace, model: Model, grids: Grids) -> tuple[list[Row], float]:
    shapes = shapes_of(model)
    rate = matrix_rate(shapes, model.dtype, model.device)
    procedure = Procedure(model.lm._module, model.tokenizer, model.eos_ids)
    rows = []
    for name in options.rows:
        workload = ROWS[name](model, grids)
        print(f"{workload.name} …", file=sys.stderr, flush=True)
        rows.append(
            compare(model, workload, shapes, procedure, cells=options.cells, edits=options.edits)
        )
    return rows, rate


def _facts(name: str, model: Model) -> dict[str, object]:
    """Where the figures are from."""
    device = model.device
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "Python": platform.python_version(),
        **{
            package: version(package)
            for package in ("torch", "transformers", "nnsight", "persona-nnsight")
        },
    }


def _names(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, text.split(",")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description="The published procedure and ours, timed on one machine."
    )
    add = parser.add_argument
    add(
        "--parts",
        type=_names((*PARTS, *MORE_PARTS)),
        default=PARTS,
        metavar="NAMES",
        help=f"out of {','.join((*PARTS, *MORE_PARTS))}; default {','.join(PARTS)}",
    )
    add(
        "--rows",
        type=_names(tuple(ROWS)),
        default=tuple(ROWS),
        metavar="NAMES",
        help=f"out of {','.join(ROWS)}; default all",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--model", default=DEFAULT_MODEL, help="as in load_model")
    chosen.add_argument(
        "--shape", choices=SHAPES, help="random weights in this shape, made on the device"
    )
    add("--device", default="auto", help="as in load_model")
    add("--dtype", default="auto", choices=("auto", *DTYPES))
    add("--grid", default="long", help="a grid in place of the long one")
    add("--cells", type=_positive, default=3, help="cells that the published procedure is timed on")
    add("--edits", type=_positive, default=9, help="edits of each of them, in a substitution")
    add(
        "--load",
        type=_sizes,
        default=(100, 1000, 10_000),
        metavar="CELLS",
        help="sizes of the grids of the part load; default 100,1000,10000",
    )
    add("--minutes", type=float, default=60, help="how long the part soak takes; default 60")
    add("--json", type=Path, metavar="PATH", help="keep the figures")
    add("--figure", type=Path, metavar="PATH", help="draw the curves")
    return parser
