"""Events of the engine as text and tensors: on the wire and on disk, and back.

Numbers go as JSON, which keeps every float exactly (NaN included); residuals and geometry go as
tensors. Nothing of it needs pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from torch import Tensor

from persona_nnsight.plan.events import Event, Recorded, Scored, Written


def pack(events: Iterable[Event]) -> tuple[str, dict[str, Tensor]]:
    """Events as (JSON text, tensors by name)."""
    recorded: list[dict[str, object]] = []
    scored, written = [], []
    tensors: dict[str, Tensor] = {}

    def put(kind: str, values: dict[str, Tensor] | None) -> list[str] | None:
        """Store tensors, and return their names in their order, which a store need not keep."""
        if values is None:
            return None
        for name, value in values.items():
            tensors[_stored(len(recorded), kind, name)] = value.contiguous()
        return list(values)

    for event in events:
        match event:
            case Recorded():
                recorded.append(
                    {
                        "cells": event.cells,
                        "continuations": event.continuations,
                        "margins": event.margins,
                        "geometry": put("geometry", event.geometry),
                        "residuals": put("residuals", event.residuals),
                    }
                )
            case Scored():
                scored.append((event.cell, event.edit, event.kl, event.n_tokens))
            case Written():
                written.append((event.cell, event.edit, event.tokens))
    return json.dumps({"recorded": recorded, "scored": scored, "written": written}), tensors


def unpack(text: str, tensors: dict[str, Tensor], first_cell: int = 0) -> list[Event]:
    """The events that were packed, their cells counted from `first_cell`."""
    data = json.loads(text)
    events: list[Event] = []
    for number, part in enumerate(data["recorded"]):
        found = {
            kind: None
            if part[kind] is None
            else {name: tensors[_stored(number, kind, name)] for name in part[kind]}
            for kind in ("geometry", "residuals")
        }
        events.append(
            Recorded(
                cells=tuple(cell + first_cell for cell in part["cells"]),
                continuations=tuple(map(tuple, part["continuations"])),
                margins=tuple(map(tuple, part["margins"])),
                geometry=found["geometry"] or {},
                residuals=found["residuals"],
            )
        )
    events += [Scored(cell + first_cell, *rest) for cell, *rest in data["scored"]]
    events += [
        Written(cell + first_cell, edit, tuple(tokens)) for cell, edit, tokens in data["written"]
    ]
    return events


def _stored(number: int, kind: str, name: str) -> str:
    return f"{number}.{kind}.{name}"
