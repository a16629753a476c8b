"""Events of the engine as text and tensors: on the wire and on disk, and back.

Numbers go as JSON, which keeps every float exactly (NaN included); residuals and geometry go as
tensors. Nothing of it needs pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from torch import Tensor

from persona_nnsight.engine import Event, Recorded, Scored, Written


def pack(events: Iterable[Event]) -> tuple[str, dict[str, Tensor]]:
    """Events as (JSON text, tensors by name)."""
    recorded: list[dict[str, object]] = []
    scored, written = [], []
    tensors: dict[str, Tensor] = {}
    for event in events:
        match event:
            case Recorded():
                number = len(recorded)
                recorded.append(
                    {
                        "cells": event.cells,
                        "continuations": event.continuations,
                        "residuals": event.residuals is not None,
                    }
                )
                for kind in ("geometry", "residuals"):
                    for name, value in (getattr(event, kind) or {}).items():
                        tensors[f"{number}.{kind}.{name}"] = value.contiguous()
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
        found: dict[str, dict[str, Tensor]] = {"geometry": {}, "residuals": {}}
        for key, value in tensors.items():
            place, kind, name = key.split(".", 2)
            if int(place) == number:
                found[kind][name] = value
        events.append(
            Recorded(
                cells=tuple(cell + first_cell for cell in part["cells"]),
                continuations=tuple(map(tuple, part["continuations"])),
                geometry=found["geometry"],
                residuals=found["residuals"] if part["residuals"] else None,
            )
        )
    events += [Scored(cell + first_cell, *rest) for cell, *rest in data["scored"]]
    events += [
        Written(cell + first_cell, edit, tuple(tokens)) for cell, edit, tokens in data["written"]
    ]
    return events
