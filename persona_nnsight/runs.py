"""A run directory: what an experiment leaves on disk.

========================  ======================================================================
``run.json``              command, arguments, model, versions, grid, token ids, timings, memory
``kl.csv``                substitute, inject: one row per cell and edit
``summary.csv``           substitute, inject: one row per edit
``text.jsonl``            with generated text: one object a line
``geometry.csv``          capture: one row per cell and site
``residuals.safetensors`` capture: h_BB, h_XB, h_BY, h_XY, float32 [cells, positions, layers, d];
                          its metadata holds the labels of the first three axes as JSON
========================  ======================================================================

The files are written under a temporary name and moved into place when all are done, ``run.json``
last: a directory that holds it holds a whole run.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.results import CaptureResult, Result

#: Version of the layout of ``run.json``.
FORMAT = 1

_LIBRARIES = ("persona-nnsight", "nnsight", "torch", "transformers", "numpy", "pandas")


def check_free(directory: Path) -> None:
    """Refuse a target that holds anything, before work is spent on it.

    Raises:
        PersonaError: `directory` is a file, holds a run, is not empty, or cannot be made.
    """
    advice = "choose another --out, or remove it first"
    try:
        if directory.is_dir():
            if (directory / "run.json").exists():
                raise PersonaError(f"{str(directory)!r} already holds a run; {advice}.")
            if any(directory.iterdir()):
                raise PersonaError(f"The directory {str(directory)!r} is not empty; {advice}.")
        elif directory.exists() or directory.is_symlink():
            raise PersonaError(f"{str(directory)!r} is a file, not a directory; {advice}.")
        writable = directory if directory.is_dir() else _existing_parent(directory)
    except OSError as error:
        raise _unwritable(directory, error) from error
    if not writable.is_dir() or not os.access(writable, os.W_OK):
        raise PersonaError(
            f"Cannot create {str(directory)!r}: {str(writable)!r} is no directory that you may "
            "write to; choose another --out."
        )


def _unwritable(directory: Path, error: OSError) -> PersonaError:
    return PersonaError(
        f"The run cannot be written to {str(directory)!r} ({error.strerror or error}); choose "
        "another --out."
    )


def _existing_parent(directory: Path) -> Path:
    parent = directory.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return parent


def default_directory(command: str, model: str, grid: str, root: Path = Path("outputs")) -> Path:
    """``outputs/<command>-<model>-<grid>-<n>`` with the lowest n that is free."""
    n = 1
    while (directory := root / f"{command}-{model}-{grid}-{n}").exists():
        n += 1
    return directory


def save_run(result: Result, directory: Path) -> Path:
    """Write `result` as a run directory and return its path.

    Raises:
        PersonaError: the directory already holds something, or cannot be written.
    """
    check_free(directory)
    made = not directory.is_dir()
    moved: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as partial:
            _write_files(result, Path(partial))
            # run.json last: a directory that has it has everything.
            for name in sorted(os.listdir(partial), key=lambda name: name == "run.json"):
                moved.append(directory / name)
                os.replace(Path(partial, name), directory / name)
    except BaseException as error:
        for path in moved:
            path.unlink(missing_ok=True)
        if made:
            shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(directory, error) from error
        raise
    return directory


def _write_files(result: Result, directory: Path) -> None:
    from safetensors.torch import save_file

    from persona_nnsight.results import CaptureResult, EditResult

    if isinstance(result, CaptureResult):
        tensors = {f"h_{key}": value.contiguous() for key, value in result.residuals.items()}
        save_file(tensors, directory / "residuals.safetensors", metadata=_axes(result))
        result.frame().to_csv(directory / "geometry.csv", index=False)
    if isinstance(result, EditResult):
        result.frame().to_csv(directory / "kl.csv", index=False)
        result.summary().to_csv(directory / "summary.csv", index=False)
        if result.texts:
            lines = (json.dumps(asdict(text), ensure_ascii=False) for text in result.texts)
            (directory / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = json.dumps(run_manifest(result), indent=1, ensure_ascii=False)
    (directory / "run.json").write_text(manifest + "\n", encoding="utf-8")


def _axes(result: CaptureResult) -> dict[str, str]:
    """What the axes of the residuals stand for, as JSON in the safetensors metadata."""
    plan = result.plan
    axes = {
        "cells": [[plan.cells[cell].persona, plan.cells[cell].task] for cell in result.cells],
        "positions": plan.positions,
        "layers": plan.layers,
    }
    return {name: json.dumps(labels) for name, labels in axes.items()}


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table of a run directory with the types it was written with.

    pandas alone reads ``layers`` as numbers where every edit has one layer, and a persona whose
    key is ``NA`` as missing.
    """
    import pandas as pd

    with open(path, encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split(",")
    text = [name for name in columns if name in _TEXT_COLUMNS]
    return pd.read_csv(
        path,
        dtype=dict.fromkeys(text, "str"),
        keep_default_na=False,
        na_values={name: [""] for name in columns if name not in _TEXT_COLUMNS},
    )


_TEXT_COLUMNS = ("persona", "task", "condition", "position", "layers")


def run_manifest(result: Result) -> dict[str, Any]:
    """The content of ``run.json``: what ran, on what, with which inputs, and how long it took."""
    model, plan = result.model, result.plan
    return {
        "format": FORMAT,
        "command": plan.command,
        "argv": sys.argv[1:] if Path(sys.argv[0]).stem == "persona" else None,
        "arguments": {
            "layers": plan.layers,
            "positions": plan.positions,
            "window": plan.window,
            "conditions": list(dict.fromkeys(edit.condition for edit in plan.edits)),
            "generate": plan.generate,
            "seed": plan.seed,
        },
        "complete": result.complete,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "id": model.weights.model_id,
            "spec": model.weights.spec,
            "revision": model.weights.revision,
            "sha256": model.weights.sha256,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device,
            "attention": model.attention,
            "n_layers": model.tree.n_layers,
            "d_model": model.tree.d_model,
            "n_parameters": model.n_parameters,
        },
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{library: version(library) for library in _LIBRARIES},
        },
        "grid": result.grid.to_dict(),
        "cells": [
            {
                "persona": cell.persona,
                "task": cell.task,
                "prompts": cell.prompts,
                "continuation": result.continuations.get(index),
            }
            for index, cell in enumerate(plan.cells)
        ],
        "prompts": [asdict(prompt) for prompt in plan.prompts],
        "cost": result.cost.to_dict(),
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
        "peak_memory_bytes": _peak_memory(model.device),
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
