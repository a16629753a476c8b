"""A plan as JSON-like data and back, by a short name, and cut into parts of fewer cells."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from persona_nnsight.errors import PersonaError, quoted
from persona_nnsight.plan.interventions import KINDS, Intervention
from persona_nnsight.plan.plan import CellPlan, Edit, Given, Plan
from persona_nnsight.prompts.prompt import Prompt
from persona_nnsight.prompts.rendering import Rendering


def to_data(plan: Plan) -> dict[str, Any]:
    """The plan as dictionaries, lists, strings and numbers."""
    return {**asdict(plan), "prompts": tuple(prompt.to_data() for prompt in plan.prompts)}


def digest(plan: Plan) -> str:
    """Short name of a plan: plans that differ in anything have others."""
    text = json.dumps(to_data(plan), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_data(data: dict[str, Any]) -> Plan:
    """The plan that `to_data` was given, also after a passage through JSON.

    Raises:
        PersonaError: a kind of intervention that there is not.
    """
    given = data["given_x"]
    return Plan(
        **{
            **data,
            "prompts": tuple(Prompt.from_data(prompt) for prompt in data["prompts"]),
            "cells": tuple(CellPlan(**cell) for cell in data["cells"]),
            "layers": tuple(data["layers"]),
            "positions": tuple(data["positions"]),
            "edits": tuple(_edit(edit) for edit in data["edits"]),
            "eos_ids": tuple(data["eos_ids"]),
            "given_x": None if given is None else {key: _given(x) for key, x in given.items()},
            "rendering": Rendering(**data["rendering"]),
        }
    )


def _edit(data: dict[str, Any]) -> Edit:
    cells = data["cells"]
    return Edit(
        **{
            **data,
            "intervention": _intervention(data["intervention"]),
            "cells": None if cells is None else tuple(cells),
        }
    )


def _intervention(data: dict[str, Any]) -> Intervention:
    kind, fields = data["kind"], {name: data[name] for name in data if name != "kind"}
    if not isinstance(kind, str) or kind not in KINDS:
        raise PersonaError(
            f"The plan asks for an intervention of kind {quoted(str(kind))}, and this version of "
            f"persona knows {' and '.join(KINDS)} alone; use the version that made the plan."
        )
    return KINDS[kind](
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
    )


def _given(positions: Any) -> Given:
    return tuple(tuple(tuple(vector) for vector in layers) for layers in positions)
