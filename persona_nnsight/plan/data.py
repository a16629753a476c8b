"""A plan as JSON-like data and back, by a short name, and cut into parts of fewer cells."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from persona_nnsight.plan.plan import CellPlan, Edit, Given, Plan, unique_prompts
from persona_nnsight.prompts.encoding import Prompt


def to_data(plan: Plan) -> dict[str, Any]:
    """The plan as dictionaries, lists, strings and numbers."""
    return asdict(plan)


def digest(plan: Plan) -> str:
    """Short name of a plan: plans that differ in anything have others."""
    text = json.dumps(to_data(plan), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_data(data: dict[str, Any]) -> Plan:
    """The plan that `to_data` was given, also after a passage through JSON."""
    given = data["given_x"]
    return Plan(
        **{
            **data,
            "prompts": tuple(
                Prompt(**{**prompt, "ids": tuple(prompt["ids"])}) for prompt in data["prompts"]
            ),
            "cells": tuple(CellPlan(**cell) for cell in data["cells"]),
            "layers": tuple(data["layers"]),
            "positions": tuple(data["positions"]),
            "edits": tuple(_edit(edit) for edit in data["edits"]),
            "eos_ids": tuple(data["eos_ids"]),
            "given_x": None if given is None else {key: _given(x) for key, x in given.items()},
        }
    )


def _edit(data: dict[str, Any]) -> Edit:
    cells = data["cells"]
    return Edit(
        **{
            **data,
            "positions": tuple(data["positions"]),
            "layers": tuple(data["layers"]),
            "cells": None if cells is None else tuple(cells),
        }
    )


def _given(positions: Any) -> Given:
    return tuple(tuple(tuple(vector) for vector in layers) for layers in positions)


def part_of(plan: Plan, cells: range) -> Plan:
    """The plan on some of its cells, with the prompts that they need.

    Edits keep their numbers; a cell of the part is its number in `plan` less ``cells.start``.
    """
    chosen = plan.cells[cells.start : cells.stop]
    kept = unique_prompts(plan, chosen)
    place = {index: number for number, index in enumerate(kept)}
    personas = {cell.persona for cell in chosen}
    given = plan.given_x
    return replace(
        plan,
        prompts=tuple(plan.prompts[index] for index in kept),
        cells=tuple(
            replace(cell, prompts={key: place[index] for key, index in cell.prompts.items()})
            for cell in chosen
        ),
        edits=tuple(
            edit
            if edit.cells is None
            else replace(edit, cells=tuple(n - cells.start for n in edit.cells if n in cells))
            for edit in plan.edits
        ),
        given_x=None if given is None else {k: x for k, x in given.items() if k in personas},
    )
