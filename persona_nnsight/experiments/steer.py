"""steer: the persona's and the task's effects written in other proportions than one to one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from persona_nnsight.backends.interface import Backend
from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.execution import Progress, execute
from persona_nnsight.experiments.results import EditResult
from persona_nnsight.experiments.setup import Layers, Positions, checked, clean_text, sites_of
from persona_nnsight.method.conditions import HOST, STEER
from persona_nnsight.method.sites import EDITED_DEPTH
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.building import build_plan
from persona_nnsight.plan.interventions import Unedited, Write
from persona_nnsight.plan.plan import Edit, Plan
from persona_nnsight.prompts.grids import Grid
from persona_nnsight.storage.vectors import Vectors

DEFAULT_ALPHA = "0:2:0.5"
HOSTS = ("xy", "by")

Factors = str | float | Iterable[float]

_SWEEP = re.compile(r"(-?[\d.]+):(-?[\d.]+):([\d.]+)")
#: More factors than this in one sweep are a typing error.
_MOST = 200


def parse_factors(factors: Factors, name: str) -> tuple[float, ...]:
    """The factors that an expression names, in its order and without repeats.

    Args:
        factors: ``1``, ``0,0.5,2``, ``0:2:0.5`` (from, to, step; both ends included), several of
            these with commas, or the numbers themselves.
        name: what they are called in errors, such as ``--alpha``.

    Raises:
        PersonaError: an unreadable expression, a number that is not finite, or too many.
    """
    if isinstance(factors, str):
        found = [value for term in factors.split(",") for value in _factor_term(term, name)]
    else:
        try:
            found = [float(f) for f in ([factors] if isinstance(factors, int | float) else factors)]
        except (TypeError, ValueError, OverflowError):
            found = []
    if not found or not all(map(math.isfinite, found)):
        raise PersonaError(f"{name} is {factors!r}; {_ALLOWED_FACTORS}.")
    return tuple(dict.fromkeys(found))


_ALLOWED_FACTORS = "write numbers as '1', '0,0.5,2' or '0:2:0.5' (from, to, step)"


def _factor_term(term: str, name: str) -> list[float]:
    text = term.strip()
    try:
        if match := _SWEEP.fullmatch(text):
            first, last, step = map(float, match.groups())
            if step <= 0 or last < first or (last - first) / step >= _MOST:
                raise PersonaError(
                    f"{name} {text!r} is no sweep of up to {_MOST} steps; write the lower end "
                    "first and a step above 0, like '0:2:0.5'."
                )
            # The end counts when a whole number of steps reaches it, rounding aside.
            steps = math.floor((last - first) / step + 1e-9)
            return [round(first + i * step, 12) + 0.0 for i in range(steps + 1)]
        return [float(text)]
    except ValueError:
        raise PersonaError(f"{name} {text!r} is not understood; {_ALLOWED_FACTORS}.") from None


def plan_steer(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = EDITED_DEPTH,
    positions: Positions = "p_last",
    alpha: Factors = DEFAULT_ALPHA,
    beta: Factors = "1",
    host: str = "xy",
    vectors: Vectors | None = None,
    window: int = 10,
    generate: int = 0,
) -> Plan:
    """The plan of `steer`, which takes the same arguments."""
    if host not in HOSTS:
        raise PersonaError(
            f"Host {host!r} does not exist; use xy (the prompt with its persona) or by (the prompt "
            "without it)."
        )
    sites = sites_of(model, layers, positions)
    at, together = sites["positions"], sites["layers"]
    given = None
    if vectors is not None:
        vectors.check(
            model_id=model.weights.model_id,
            model_sha256=model.weights.sha256,
            n_layers=model.tree.n_layers,
            d_model=model.tree.d_model,
            grid=grid,
            layers=together,
            positions=at,
        )
        given = vectors.given_x(grid.persona_keys, at, together)
    common: dict[str, Any] = {"host": host.upper(), "generate": generate}
    control = Unedited(HOST, at) if host == "by" else Write("bb", at, together)
    steered = [
        Edit(Write(STEER, at, together, alpha=a, beta=b), **common)
        for b in parse_factors(beta, "--beta")
        for a in parse_factors(alpha, "--alpha")
    ]
    edits = [Edit(control, **common), *steered]
    if generate:
        edits.append(clean_text(generate))
    plan = build_plan(
        "steer", model.tokenizer, grid, window=window, edits=edits, given_x=given, **sites
    )
    return checked(plan, model)


def steer(
    model: Model,
    grid: Grid,
    *,
    layers: Layers = EDITED_DEPTH,
    positions: Positions = "p_last",
    alpha: Factors = DEFAULT_ALPHA,
    beta: Factors = "1",
    host: str = "xy",
    vectors: Vectors | None = None,
    window: int = 10,
    generate: int = 0,
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> EditResult:
    """Write h_BB + α·Δ_X + β·Δ_Y and measure KL and text against α and β.

    All of `layers` and `positions` are written in one run, each site with its own vector; the KL
    window begins after the first of the positions. α = β = 1 is the additive vector, α = 0, β = 1
    the task alone, α = β = 0 the baseline.

    Args:
        model: from `load_model`.
        grid: the cells.
        layers, positions: where to write; see `capture`.
        alpha, beta: factors of Δ_X and Δ_Y; every pair is a run (`parse_factors`).
        host: what is run: ``xy``, the prompt with its persona, or ``by``, the prompt without it.
        vectors: Δ_X from an earlier run, in place of this grid's own: with host ``by`` the paper's
            cached case.
        window: tokens per KL.
        generate: also write this many tokens of greedy text per run.
        progress: called with (rows done, rows in all).
        backend: what does the work (`persona_nnsight.backends`); None does it here.

    Raises:
        PersonaError: bad input, or a value that is not finite.
        Interrupted: Ctrl-C; holds the finished rows.
    """
    plan = plan_steer(
        model,
        grid,
        layers=layers,
        positions=positions,
        alpha=alpha,
        beta=beta,
        host=host,
        vectors=vectors,
        window=window,
        generate=generate,
    )
    result = execute(model, grid, plan, progress, backend)
    assert isinstance(result, EditResult)
    return result
