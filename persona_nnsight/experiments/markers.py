"""markers: whether generated text still shows the persona (the paper's Table 3)."""

from __future__ import annotations

from persona_nnsight.backends.interface import Backend
from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.execution import Progress, execute
from persona_nnsight.experiments.results import MarkersResult
from persona_nnsight.experiments.setup import Layers, checked, clean_text, sites_of
from persona_nnsight.method.conditions import BARE, TASK_KEY
from persona_nnsight.method.sites import EDITED_DEPTH
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.building import build_plan
from persona_nnsight.plan.interventions import Unedited, Write
from persona_nnsight.plan.plan import Edit, Plan
from persona_nnsight.prompts.grids import Grid


def plan_markers(
    model: Model, grid: Grid, *, layers: Layers = EDITED_DEPTH, tokens: int = 80
) -> Plan:
    """The plan of `markers`, which takes the same arguments."""
    if tokens < 1:
        raise PersonaError(f"A text of {tokens} tokens holds no marker; use 1 or more (80).")
    chosen = {persona.key: persona for persona in grid.personas}
    without = [key for key in grid.persona_keys if not chosen[key].markers]
    if without:
        raise PersonaError(
            f"The persona {without[0]!r} of grid {grid.name!r} has no markers, so nothing in a "
            "text can be counted for it; give it some (markers: [simmer, mise en place]), or leave "
            "it out."
        )
    sites = sites_of(model, layers, "p_last")
    edits = [clean_text(tokens)]
    edits += [
        Edit(Write(condition, ("p_last",), (layer,)), scored=False, generate=tokens)
        for condition in ("additive", "remove_x")
        for layer in sites["layers"]
    ]
    bare = Unedited(BARE, ("p_last",))
    edits.append(Edit(bare, host=TASK_KEY, scored=False, generate=tokens))
    # No KL is taken, so the shortest clean continuation will do.
    plan = build_plan("markers", model.tokenizer, grid, window=1, edits=edits, **sites)
    return checked(plan, model, text_option="--tokens")


def markers(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = EDITED_DEPTH,
    tokens: int = 80,
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> MarkersResult:
    """Generate text with the persona's effect kept, replaced and taken out, and count markers.

    Greedy text under ``clean`` (XY as it is), ``additive`` and ``remove_x`` (one residual written
    at ``p_last``, at one layer at a time), and ``bare`` (the task alone as the user message).

    Args:
        model: from `load_model`.
        grid: the cells; every persona needs markers.
        layers: where to write; see `capture`.
        tokens: length of a text, in tokens; shorter where it ends by itself.
        progress: called with (rows done, rows in all).
        backend: what does the work (`persona_nnsight.backends`); None does it here.

    Raises:
        PersonaError: bad input, or a value that is not finite.
        Interrupted: Ctrl-C; holds the finished texts.
    """
    plan = plan_markers(model, grid, layers=layers, tokens=tokens)
    result = execute(model, grid, plan, progress, backend)
    assert isinstance(result, MarkersResult)
    return result
