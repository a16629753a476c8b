"""inject: the persona's residual is written into the prompt without the persona."""

from __future__ import annotations

from typing import Any

from persona_nnsight.backends.interface import Backend
from persona_nnsight.experiments.execution import Progress, execute
from persona_nnsight.experiments.results import EditResult
from persona_nnsight.experiments.setup import Layers, checked, clean_text, sites_of
from persona_nnsight.method.conditions import HOST, INJECT_CONDITIONS
from persona_nnsight.method.sites import DEFAULT_LAYERS, parse_layer_sets
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.building import build_plan
from persona_nnsight.plan.interventions import Unedited, Write
from persona_nnsight.plan.plan import Edit, Plan
from persona_nnsight.prompts.grids import Grid


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
    sets = list(parse_layer_sets(layers, model.tree.n_layers))
    every = sorted({layer for chosen in sets for layer in chosen})
    if each:
        sets += [(layer,) for layer in every if (layer,) not in sets]
    sites = sites_of(model, every, "p_last")
    into_host: dict[str, Any] = {"host": "BY", "generate": generate}
    edits = [Edit(Unedited(HOST, ("p_last",)), **into_host)]
    edits += [
        Edit(Write(condition, ("p_last",), chosen), **into_host)
        for condition in INJECT_CONDITIONS
        for chosen in sets
    ]
    if generate:
        edits.append(clean_text(generate))
    plan = build_plan("inject", model.tokenizer, grid, window=window, edits=edits, **sites)
    return checked(plan, model)


def inject(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = DEFAULT_LAYERS,
    each: bool = False,
    window: int = 10,
    generate: int = 0,
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> EditResult:
    """Write the persona's residual into the prompt without the persona, at its last token.

    The host is BY. All layers of a set are written in one run, each with its own vector; every run
    is scored on XY's clean continuation, KL(clean XY ‖ host run).

    Args:
        model: from `load_model`.
        grid: the cells.
        layers: the layers that are written together, or several such sets: ``14; 10-18:2``.
        each: add a run for every layer alone.
        window: tokens per KL.
        generate: also write this many tokens of greedy text per edit.
        progress: called with (rows done, rows in all).
        backend: what does the work (`persona_nnsight.backends`); None does it here.

    Raises:
        PersonaError: bad input, or a value that is not finite.
        Interrupted: Ctrl-C; holds the finished rows.
    """
    plan = plan_inject(model, grid, layers=layers, each=each, window=window, generate=generate)
    result = execute(model, grid, plan, progress, backend)
    assert isinstance(result, EditResult)
    return result
