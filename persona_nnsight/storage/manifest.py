"""``run.json``: everything needed to say where a run's numbers come from."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_nnsight.models.decoding import CHECKPOINT, GREEDY

if TYPE_CHECKING:
    from persona_nnsight.models.loading import Model
    from persona_nnsight.plan.costs import Cost
    from persona_nnsight.plan.plan import Plan
    from persona_nnsight.prompts.grids import Grid

#: Version of the layout of ``run.json``.
FORMAT = 2

_LIBRARIES = ("persona-nnsight", "nnsight", "torch", "transformers", "numpy", "pandas")


def run_manifest(
    *,
    model: Model,
    grid: Grid,
    plan: Plan,
    cost: Cost,
    continuations: Mapping[int, tuple[int, ...]],
    margins: Mapping[int, float],
    seconds: Mapping[str, float],
    complete: bool,
    where: Mapping[str, Any],
    margin: float | None = None,
) -> dict[str, Any]:
    """What ran, on what, with which inputs, and how long it took, as JSON-like data.

    Args:
        model, grid, plan, cost: what ran.
        continuations: XY's clean greedy token ids by index of the cell in the plan.
        margins: the smallest gap between the two largest logits of each continuation, likewise.
        seconds: wall time by stage.
        complete: whether the run came to its end.
        where: where it ran (`persona_nnsight.backends.interface.Backend.record`).
        margin: the share of a control's KL that makes no matter, where the run has verdicts on KLs.
    """
    return {
        **_header(plan.command, where, complete=complete),
        "arguments": {
            "layers": plan.layers,
            "positions": plan.positions,
            "window": plan.window,
            "conditions": list(dict.fromkeys(edit.name for edit in plan.edits)),
            "hosts": list(dict.fromkeys(edit.host for edit in plan.edits)),
            "generate": plan.longest_text,
            "seed": plan.seed,
            **({} if margin is None else {"margin": margin}),
        },
        **rendering_record(plan),
        **_origin(model, where),
        "decoding": {"name": CHECKPOINT if plan.decoding else GREEDY, "settings": plan.decoding},
        "grid": grid.to_dict(),
        "cells": [
            {
                "persona": cell.persona,
                "task": cell.task,
                "prompts": cell.prompts,
                "continuation": continuations.get(index),
                "smallest_margin": margins.get(index),
            }
            for index, cell in enumerate(plan.cells)
        ],
        "prompts": [prompt.to_data() for prompt in plan.prompts],
        "cost": cost.to_dict(),
        **_spent(model, where, seconds),
    }


def rendering_record(plan: Plan) -> dict[str, Any]:
    """What is said of how a plan's prompts were rendered; nothing where no date is in them."""
    return {} if plan.rendering.date is None else {"rendering": asdict(plan.rendering)}


def reproduction_manifest(
    model: Model,
    parts: Mapping[str, Plan],
    seconds: Mapping[str, float],
    *,
    complete: bool,
    where: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of a reproduction, whose parts are run directories with their own.

    Args:
        model: what it ran on.
        parts: the plans of the tables, by the names of their directories.
        seconds: wall time by pass.
        complete: whether it came to its end.
        where: where it ran.
    """
    return {
        **_header("reproduce", where, complete=complete),
        "parts": list(parts),
        **rendering_record(next(iter(parts.values()))),
        **_origin(model, where),
        **_spent(model, where, seconds),
    }


def _header(command: str, where: Mapping[str, Any], *, complete: bool) -> dict[str, Any]:
    typed = sys.argv[1:] if Path(sys.argv[0]).stem == "persona" else None
    return {
        "format": FORMAT,
        "command": command,
        # A run that was resumed is what was typed when it began.
        "argv": where.get("argv") or typed,
        "complete": complete,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _origin(model: Model, where: Mapping[str, Any]) -> dict[str, Any]:
    """The model, where it ran, and the versions of what ran it."""
    # A server has the weights, and they are as it loaded them.
    served = where.get("server") or {}
    return {
        "model": {
            "id": model.weights.model_id,
            "spec": model.weights.spec,
            # A server takes the branch that it was asked for, which may have moved here or there.
            "revision": where.get("revision", model.weights.revision),
            "sha256": model.weights.sha256,
            "dtype": served.get("dtype", str(model.dtype).removeprefix("torch.")),
            "device": served.get("device", model.device),
            "attention": served.get("attention", model.attention),
            **({} if model.quantization is None else {"quantization": model.quantization}),
            "n_layers": model.tree.n_layers,
            "d_model": model.tree.d_model,
            "n_parameters": model.n_parameters,
            "trust_remote_code": model.trust_remote_code,
        },
        "backend": {name: value for name, value in where.items() if name != "argv"},
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{library: version(library) for library in _LIBRARIES},
        },
    }


def _spent(model: Model, where: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Time and memory; how much of it a server took is not known here."""
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_bytes": {} if "server" in where else _peak_memory(model.device),
    }


def _peak_memory(device: str) -> dict[str, int]:
    """Most memory this process has held: ``host``, and ``gpu`` where there is one."""
    peak: dict[str, int] = {}
    if sys.platform == "win32":
        import psutil

        peak["host"] = psutil.Process().memory_info().peak_wset
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.startswith("cuda") or device == "balanced":
        import torch

        peak["gpu"] = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return peak
