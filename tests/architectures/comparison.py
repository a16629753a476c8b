"""Experiments on a tiny model, set against the oracle number by number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cells import TINY_GRID, cell_prompts, decode, reference_of
from reference import Reference, vector
from torch import Tensor

from persona_nnsight import Model, capture, inject, substitute

GRID = TINY_GRID.select(["yoda", "marx"], ["haiku", "review"])
CELLS = (0, 3)
"""Of the grid, those that are compared: the shortest prompt and the longest."""
POSITIONS = ("p_user_last", "p_last", "g1")
CONDITIONS = ("additive", "bb", "clean")
_WINDOW, _TOKENS = 6, 6

Numbers = dict[tuple[object, ...], Any]
"""KLs, residuals and texts, each by what it is of."""


@dataclass
class Difference:
    """How far an experiment is from the oracle.

    Attributes:
        kl: of KLs, in nats; above 1 nat in relation to it.
        residual: of residuals, in relation to their norm.
        texts: how many are others.
        matters: the largest KL of an edit; near 0 nothing was compared.
    """

    kl: float = 0.0
    residual: float = 0.0
    texts: int = 0
    matters: float = 0.0

    def within(self, tolerance: float) -> bool:
        """Whether everything is equal, but for rounding."""
        return max(self.kl, self.residual) <= tolerance and not self.texts

    def __str__(self) -> str:
        told = [f"KL off by {self.kl:.1e}", f"residuals by {self.residual:.1e}"]
        return ", ".join([*told, *([f"{self.texts} texts differ"] if self.texts else [])])


def layers_of(model: Model) -> tuple[int, ...]:
    """A low layer, one in the middle and a high one."""
    n_layers = model.tree.n_layers
    return tuple(sorted({0, n_layers // 2, n_layers - 1}))


def compare(found: Numbers, expected: Numbers) -> Difference:
    """How far the experiments are from the oracle, which has numbers of fewer cells."""
    difference = Difference()
    for key, value in expected.items():
        own = found[key]
        if isinstance(value, str):
            difference.texts += own != value
        elif isinstance(value, Tensor):
            apart = float((own - value).norm() / (value.norm() + 1e-9))
            difference.residual = _larger(difference.residual, apart)
        else:
            difference.kl = _larger(difference.kl, abs(own - value) / max(1.0, abs(value)))
            if "clean" not in key and "host" not in key:
                difference.matters = max(difference.matters, value)
    return difference


def _larger(a: float, b: float) -> float:
    """The larger one; what is not a number is the largest."""
    return a if a >= b else b


def experiments(model: Model) -> tuple[Numbers, set[str]]:
    """Numbers of `capture`, `substitute` and `inject`, and which paths their rows took."""
    layers = layers_of(model)
    sites: Any = {"layers": layers, "positions": POSITIONS, "window": _WINDOW}
    captured = capture(model, GRID, **sites)
    edited = substitute(model, GRID, conditions=CONDITIONS, generate=_TOKENS, **sites)
    injected = inject(model, GRID, layers=layers[1:], each=True, window=_WINDOW, generate=_TOKENS)
    numbers: Numbers = {}
    for index in CELLS:
        for key, residuals in captured.residuals.items():
            for p, position in enumerate(POSITIONS):
                for n, layer in enumerate(layers):
                    numbers["residual", index, key, position, layer] = residuals[index, p, n]
    cells = {(cell.persona.key, cell.task.key): n for n, cell in enumerate(GRID.cells)}
    for name, result in (("substitute", edited), ("inject", injected)):
        for row in result.frame().to_dict("records"):
            index = cells[row["persona"], row["task"]]
            edit = index, row["condition"], row["position"], row["layers"]
            numbers[("kl", name, *edit)] = row["kl"]
        for text in result.texts:
            index = cells[text.persona, text.task]
            written = index, text.condition, text.position, text.layers
            numbers[("text", name, *written)] = text.text
    paths = {result.where["path"]["name"] for result in (captured, edited, injected)}
    return numbers, paths


def oracle(model: Model) -> Numbers:
    """The same from the oracle, of the cells that are compared."""
    reference = reference_of(model, layers=model.tree.layers)
    numbers: Numbers = {}
    for index in CELLS:
        prompts = cell_prompts(GRID, GRID.cells[index])
        continuation = reference.continuation(prompts, POSITIONS, _WINDOW)
        _substituted(numbers, index, model, reference, prompts, continuation)
        _injected(numbers, index, model, reference, prompts, continuation)
    return numbers


def _substituted(
    numbers: Numbers,
    index: int,
    model: Model,
    reference: Reference,
    prompts: Mapping[str, str],
    continuation: list[int],
) -> None:
    ids = reference.ids(prompts["XY"])
    clean = decode(model, continuation[:_TOKENS])
    numbers["text", "substitute", index, "clean", None, None] = clean
    for position in POSITIONS:
        site = reference.positions(prompts["XY"], position, continuation)
        for layer in layers_of(model):
            h = reference.cell_residuals(prompts, position, layer, continuation)
            for key, value in h.items():
                if key != "X'B":
                    numbers["residual", index, key, position, layer] = value
            for condition in CONDITIONS:
                edit = index, condition, position, str(layer)
                numbers[("kl", "substitute", *edit)] = reference.substitution_kl(
                    prompts, position, layer, condition, continuation, _WINDOW
                ).kl
                if condition != "clean":
                    edits = {layer: {site: vector(condition, h)}}
                    text = decode(model, reference.greedy(ids, _TOKENS, edits))
                    numbers[("text", "substitute", *edit)] = text


def _injected(
    numbers: Numbers,
    index: int,
    model: Model,
    reference: Reference,
    prompts: Mapping[str, str],
    continuation: list[int],
) -> None:
    every = layers_of(model)[1:]
    sets = {every, *((layer,) for layer in every)}
    ids = reference.ids(prompts["BY"])
    tokens = continuation[:_WINDOW]
    numbers["kl", "inject", index, "host", "p_last", "none"] = reference.injection_kl(
        prompts, (), "host", tokens, _WINDOW
    ).kl
    for condition, written in (("oracle", "clean"), ("cached", "additive")):
        for layers in sets:
            key = (index, condition, "p_last", "+".join(map(str, layers)))
            numbers[("kl", "inject", *key)] = reference.injection_kl(
                prompts, layers, condition, tokens, _WINDOW
            ).kl
            edits = {}
            for layer in layers:
                h = reference.cell_residuals(prompts, "p_last", layer, tokens)
                edits[layer] = {len(ids) - 1: vector(written, h)}
            text = decode(model, reference.greedy(ids, _TOKENS, edits))
            numbers[("text", "inject", *key)] = text
