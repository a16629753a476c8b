"""The three experiments: grid and options in, results out.

Each is a plan, which needs no weights, carried out by `execute`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from persona_nnsight.conditions import HOST, INJECT_CONDITIONS, SUBSTITUTE_CONDITIONS
from persona_nnsight.costs import estimate, fit_limits
from persona_nnsight.engine import Recorded, Scored, Written, run
from persona_nnsight.errors import PersonaError
from persona_nnsight.grids import Grid
from persona_nnsight.models import Model
from persona_nnsight.plan import Edit, Plan, build_plan
from persona_nnsight.results import CaptureResult, EditResult, Result, Text
from persona_nnsight.sites import (
    DEFAULT_LAYERS,
    DEFAULT_POSITIONS,
    format_layers,
    parse_layers,
    parse_positions,
)

#: Called as ``progress(done, total)`` whenever work is finished; the unit is one row of a table.
Progress = Callable[[int, int], None]

Layers = str | int | Iterable[int]
Positions = str | Iterable[str]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``result`` holds what was finished, or None."""

    def __init__(self, result: Result | None) -> None:
        super().__init__()
        self.result = result


def plan_capture(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    positions: Positions = DEFAULT_POSITIONS,
    window: int = 10,
) -> Plan:
    """The plan of `capture`, which takes the same arguments."""
    sites = _sites(model, layers, positions)
    return _checked(build_plan("capture", model.tokenizer, grid, window=window, **sites), model)


def capture(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    positions: Positions = DEFAULT_POSITIONS,
    window: int = 10,
    progress: Progress | None = None,
) -> CaptureResult:
    """Record the residuals of BB, XB, BY and XY at every asked site, and how they add up.

    At g1, g2, … all four are teacher-forced on XY's greedy continuation, so positions line up.

    Args:
        model: from `load_model`.
        grid: the cells.
        layers: an expression such as ``4-12`` or ``25%,40%``, or layer numbers.
        positions: names such as ``p_last,g1,g2``.
        window: tokens of XY's continuation that are kept beyond the last position.
        progress: called with (rows done, rows in all).

    Raises:
        PersonaError: bad input, or a value that is not finite.
        Interrupted: Ctrl-C; holds the finished cells.
    """
    plan = plan_capture(model, grid, layers=layers, positions=positions, window=window)
    result = execute(model, grid, plan, progress)
    assert isinstance(result, CaptureResult)
    return result


def plan_substitute(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    positions: Positions = DEFAULT_POSITIONS,
    conditions: str | Iterable[str] | None = None,
    window: int = 10,
    generate: int = 0,
    seed: int = 0,
) -> Plan:
    """The plan of `substitute`, which takes the same arguments."""
    sites = _sites(model, layers, positions)
    edits = [
        Edit(condition, position, (layer,))
        for condition in _conditions(conditions, grid)
        for position in sites["positions"]
        for layer in sites["layers"]
    ]
    plan = build_plan(
        "substitute",
        model.tokenizer,
        grid,
        window=window,
        edits=edits,
        generate=generate,
        seed=seed,
        **sites,
    )
    return _checked(plan, model)


def substitute(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    positions: Positions = DEFAULT_POSITIONS,
    conditions: str | Iterable[str] | None = None,
    window: int = 10,
    generate: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> EditResult:
    """Overwrite one residual of the XY run, one site at a time, and measure what changes.

    KL is Σ over the `window` tokens after the site of KL(clean ‖ patched), in nats.

    Args:
        model: from `load_model`.
        grid: the cells.
        layers, positions: the sites; see `capture`.
        conditions: which vectors to write, from `SUBSTITUTE_CONDITIONS`; None for all (without
            ``other_x`` when the grid has a single persona).
        window: tokens per KL.
        generate: also write this many tokens of greedy text per edit.
        seed: of the ``random`` control.
        progress: called with (rows done, rows in all).

    Raises:
        PersonaError: bad input, or a value that is not finite.
        Interrupted: Ctrl-C; holds the finished rows.
    """
    plan = plan_substitute(
        model,
        grid,
        layers=layers,
        positions=positions,
        conditions=conditions,
        window=window,
        generate=generate,
        seed=seed,
    )
    result = execute(model, grid, plan, progress)
    assert isinstance(result, EditResult)
    return result


def plan_inject(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    each: bool = False,
    window: int = 10,
    generate: int = 0,
) -> Plan:
    """The plan of `inject`, which takes the same arguments."""
    sites = _sites(model, layers, "p_last")
    together: tuple[int, ...] = sites["layers"]
    sets = [together]
    if each and len(together) > 1:
        sets += [(layer,) for layer in together]
    edits = [Edit(HOST, "p_last", ())]
    edits += [Edit(condition, "p_last", s) for condition in INJECT_CONDITIONS for s in sets]
    plan = build_plan(
        "inject",
        model.tokenizer,
        grid,
        window=window,
        edits=edits,
        host="BY",
        generate=generate,
        **sites,
    )
    return _checked(plan, model)


def inject(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    each: bool = False,
    window: int = 10,
    generate: int = 0,
    progress: Progress | None = None,
) -> EditResult:
    """Write the persona's residual into the prompt without the persona, at its last token.

    The host is BY. All of `layers` are written in one run, each with its own vector; every run is
    scored on XY's clean continuation, KL(clean XY ‖ host run).

    Args:
        model: from `load_model`.
        grid: the cells.
        layers: the layers that are written together.
        each: add a run for every layer alone.
        window: tokens per KL.
        generate: also write this many tokens of greedy text per edit.
        progress: called with (rows done, rows in all).

    Raises:
        PersonaError: bad input, or a value that is not finite.
        Interrupted: Ctrl-C; holds the finished rows.
    """
    plan = plan_inject(model, grid, layers=layers, each=each, window=window, generate=generate)
    result = execute(model, grid, plan, progress)
    assert isinstance(result, EditResult)
    return result


def _conditions(conditions: str | Iterable[str] | None, grid: Grid) -> list[str]:
    has_donor = len(grid.personas) > 1
    if conditions is None:
        return [name for name in SUBSTITUTE_CONDITIONS if name != "other_x" or has_donor]
    names = conditions.split(",") if isinstance(conditions, str) else conditions
    wanted = list(dict.fromkeys(name.strip() for name in names))
    for name in wanted:
        if name not in SUBSTITUTE_CONDITIONS:
            raise PersonaError(
                f"Condition {name!r} does not exist; use {', '.join(SUBSTITUTE_CONDITIONS)}."
            )
    if not wanted:
        raise PersonaError(f"No condition was named; use {', '.join(SUBSTITUTE_CONDITIONS)}.")
    if "other_x" in wanted and not has_donor:
        raise PersonaError(
            "Condition 'other_x' needs a second persona to take Δ_X from and this grid has one; "
            "use a grid with several, or leave the condition out."
        )
    return [name for name in SUBSTITUTE_CONDITIONS if name in wanted]


def _sites(model: Model, layers: Layers, positions: Positions) -> dict[str, Any]:
    """What every plan takes from the model and the site expressions."""
    return {
        "layers": parse_layers(layers, model.tree.n_layers),
        "positions": parse_positions(positions),
        "eos_ids": model.eos_ids,
    }


def _checked(plan: Plan, model: Model) -> Plan:
    """Refuse a plan whose longest sequence the model has no positions for."""
    longest = max(plan.prompts, key=lambda prompt: len(prompt.ids))
    option = "--window" if plan.reference_tokens >= plan.generate else "--generate"
    tokens = len(longest.ids) + max(plan.reference_tokens, plan.generate)
    if tokens > model.tree.max_length:
        raise PersonaError(
            f"The prompt {_shorten(longest.text)!r} and its continuation take {tokens} tokens and "
            f"this model has room for {model.tree.max_length}; use shorter texts or a smaller "
            f"{option}."
        )
    return plan


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def execute(model: Model, grid: Grid, plan: Plan, progress: Progress | None = None) -> Result:
    """Carry out a plan that was made for this model and grid, and gather its results.

    Raises:
        PersonaError: a value that is not finite, or memory that runs out.
        Interrupted: Ctrl-C; holds what was finished.
    """
    if not model.has_weights:
        raise PersonaError("This model was loaded without weights; use load_model(...) as it is.")
    limits = fit_limits(plan, model)
    cost = estimate(plan, model, limits)
    continuations: dict[int, tuple[int, ...]] = {}
    residuals: list[dict[str, torch.Tensor]] = []
    scores: list[Scored] = []
    texts: list[Text] = []
    total = len(plan.cells) * (1 + len(plan.edits) + len(plan.text_edits))
    done = 0
    start = time.perf_counter()
    recorded = 0.0

    def result(*, complete: bool) -> Result:
        common: dict[str, Any] = {
            "model": model,
            "grid": grid,
            "plan": plan,
            "cost": cost,
            "continuations": continuations,
            "seconds": {
                "first_cells_recorded": recorded,
                "total": time.perf_counter() - start,
            },
            "complete": complete,
        }
        if plan.edits:
            return EditResult(**common, scores=scores, texts=texts)
        joined = {key: torch.cat([part[key] for part in residuals]) for key in residuals[0]}
        return CaptureResult(**common, residuals=joined, cells=tuple(continuations))

    try:
        for event in run(model.lm, model.tree, plan, limits):
            match event:
                case Recorded():
                    continuations.update(zip(event.cells, event.continuations, strict=True))
                    if event.residuals is not None:
                        residuals.append(event.residuals)
                    recorded = recorded or time.perf_counter() - start
                    done += len(event.cells)
                case Scored():
                    scores.append(event)
                    done += 1
                case Written():
                    texts.append(_text(model, plan, event))
                    done += 1
            if progress is not None:
                progress(done, total)
    except KeyboardInterrupt as interrupt:
        finished = bool(scores or residuals)
        raise Interrupted(result(complete=False) if finished else None) from interrupt
    except torch.OutOfMemoryError as error:
        raise PersonaError(
            f"{model.device} ran out of memory in batches of {limits.rows} rows; free some of it, "
            "or use a smaller grid, a shorter --window or another --device."
        ) from error
    return result(complete=True)


def _text(model: Model, plan: Plan, event: Written) -> Text:
    cell = plan.cells[event.cell]
    edit = plan.edits[event.edit] if event.edit is not None else None
    site = edit if edit is not None and edit.layers else None
    return Text(
        persona=cell.persona,
        task=cell.task,
        condition=edit.condition if edit else "clean",
        position=site.position if site else None,
        layers=format_layers(site.layers) if site else None,
        text=str(
            model.tokenizer.decode(
                list(event.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        ),
        n_tokens=len(event.tokens),
    )
