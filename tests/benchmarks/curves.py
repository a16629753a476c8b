"""Cost curves: one size of a plan doubled at a time, on a small model with random weights.

Cost should grow with the plan and with nothing else: twice the edited layers, twice the patched
work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies import study_of
from transformers import LlamaConfig

from benchmarks.floor import floor_parts
from benchmarks.measure import measure
from benchmarks.random_models import SPECIAL, random_model, texts_of
from benchmarks.work import Work, shapes_of
from persona_nnsight import Grid, Model
from persona_nnsight.experiments.execution import execute
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.plan.joining import part_of
from persona_nnsight.plan.plan import Plan

N_LAYERS = 16
_VOCAB = 8192

#: What a grid of the curves is made of.
_TASKS = 4
_WORDS = ("who", "keeps", "a", "list", "of", "what", "went", "wrong", "and", "reads", "it", "twice")

#: Edited layers around the middle: however many there are, they are as deep on average, so that
#: twice the layers are twice the layers that a patched token goes through.
_LAYERS = {
    1: (8,),
    2: (7, 9),
    4: (6, 7, 9, 10),
    8: (4, 5, 6, 7, 9, 10, 11, 12),
}


@dataclass(frozen=True)
class Size:
    """A plan by its sizes; a curve changes one of them."""

    cells: int = 4
    layers: int = 1
    positions: int = 1
    prompt_words: int = 32
    vocabulary: int = _VOCAB


#: The curves: which size takes which values.
CURVES: dict[str, tuple[int, ...]] = {
    "cells": (4, 8, 16, 32),
    "layers": tuple(_LAYERS),
    "positions": (1, 2, 4, 8),
    "prompt_words": (32, 64, 128, 256),
    "vocabulary": tuple(1024 * k for k in (8, 16, 32, 64, 128, 256)),
}


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        curve, value: the size that was changed, and to what.
        seconds: wall time.
        work, floor: what was computed, and the least there is.
        patched: the part of the floor that edits need.
        flops: of the work.
    """

    curve: str
    value: int
    seconds: float
    work: Work
    floor: Work
    patched: Work
    flops: float


def points(names: tuple[str, ...] = tuple(CURVES), *, device: str, dtype: str) -> Iterator[Point]:
    """Run the curves, point by point."""
    small = _ready(_VOCAB, device, dtype)
    for name in names:
        for value in CURVES[name]:
            size = Size(**{name: value})
            model = small
            if size.vocabulary != _VOCAB:
                model = _ready(size.vocabulary, device, dtype)
            yield _point(name, value, model, size)


def _ready(vocabulary: int, device: str, dtype: str) -> Model:
    """The model after a first run: what only that takes is not timed."""
    model = curve_model(vocabulary, device=device, dtype=dtype)
    execute(model, study_of(curve_grid(Size()), part_of(curve_plan(model, Size()), range(1))))
    return model


def curve_model(vocabulary: int, *, device: str, dtype: str) -> Model:
    """The model of the curves, with so many rows of embeddings."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **SPECIAL,
    )
    texts = texts_of([curve_grid(Size())])
    return random_model("curves", config, texts, device=device, dtype=dtype)


def curve_grid(size: Size) -> Grid:
    """A grid of so many cells, each with a persona of so many words."""
    words = [_WORDS[i % len(_WORDS)] for i in range(size.prompt_words)]
    return Grid.from_dict(
        {
            "name": "curves",
            "baseline": {"persona": "someone", "task": "give some advice."},
            "personas": {
                f"p{number}": " ".join([f"number {number}", *words])
                for number in range(size.cells // _TASKS)
            },
            "tasks": {f"t{number}": f"write note {number}." for number in range(_TASKS)},
        }
    )


def curve_plan(model: Model, size: Size) -> Plan:
    positions = ["p_last", *(f"g{k}" for k in range(1, size.positions))]
    return Substitute(layers=_LAYERS[size.layers], positions=positions, conditions="additive").plan(
        model, curve_grid(size)
    )


def _point(curve: str, value: int, model: Model, size: Size) -> Point:
    grid, plan = curve_grid(size), curve_plan(model, size)
    _, measured = measure(model, lambda: execute(model, study_of(grid, plan)))
    parts = floor_parts(plan, N_LAYERS)
    return Point(
        curve=curve,
        value=value,
        seconds=measured.seconds,
        work=measured.work,
        floor=sum(parts.values(), Work()),
        patched=parts["edited"],
        flops=shapes_of(model).flops(measured.work),
    )


def draw(found: list[Point], path: Path) -> None:
    """Write the curves as a figure: time and work relative to the first point, both axes in log 2.

    The patched tokens × layers are those of the floor. A dashed line is proportional growth.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point.curve for point in found))
    figure = Figure(figsize=(3 * len(names), 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        own = [point for point in found if point.curve == name]
        values = [point.value for point in own]
        lines = {
            "seconds": [point.seconds for point in own],
            "FLOP": [point.flops for point in own],
            "patched, floor": [float(point.patched.token_layers) for point in own],
        }
        axis.plot(values, [v / values[0] for v in values], "--", color="0.7", label="proportional")
        for label, numbers in lines.items():
            axis.plot(values, [n / numbers[0] for n in numbers], marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel(name.replace("_", " "))
    axes[0].set_ylabel("relative to the first")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
