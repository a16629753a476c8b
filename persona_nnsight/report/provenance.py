"""Where the numbers of a run come from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from persona_nnsight.pages.blocks import Facts
from persona_nnsight.pages.stored_run import Run

_MODEL = ("id", "spec", "revision", "sha256", "dtype", "device", "attention", "quantization")


def provenance(run: Run) -> Facts:
    """Model, versions, command line, arguments, time and memory, as far as the run says."""
    manifest, model = run.manifest, run.facts("model")
    rows: list[tuple[str, str]] = [("state", "complete" if run.complete else "INTERRUPTED")]
    if manifest.get("argv"):
        rows.append(("command line", shlex.join(["persona", *map(str, manifest["argv"])])))
    elif "argv" in manifest:
        rows.append(("command line", f"none: {run.command} was called from Python"))
    rows += [(f"model {name}", str(model[name])) for name in _MODEL if model.get(name) is not None]
    if model.get("trust_remote_code"):
        rows.append(("code of the checkpoint", "was trusted (--trust-remote-code)"))
    where = run.facts("backend")
    if where.get("host"):
        jobs = where.get("jobs") or []
        rows.append(("server", f"{where['host']} (NDIF), {len(jobs)} jobs"))
    server = where.get("server")
    path = where.get("path") or (server.get("path") if isinstance(server, dict) else None)
    if isinstance(path, dict):
        rows.append(("path of rows", f"{path.get('name')} ({path.get('why')})"))
    size = [
        f"{model[name]:,} {label}"
        for name, label in (
            ("n_parameters", "parameters"),
            ("n_layers", "layers"),
            ("d_model", "wide"),
        )
        if isinstance(model.get(name), int)
    ]
    if size:
        rows.append(("model size", ", ".join(size)))
    if run.grid is not None:
        rows += [
            ("grid", run.grid.name),
            ("template", run.grid.template),
            ("baseline persona", run.grid.baseline_persona),
            ("baseline task", run.grid.baseline_task),
        ]
    rows += [(f"{name} in prompts", str(value)) for name, value in run.facts("rendering").items()]
    rows += [(name, _plain(value)) for name, value in run.facts("arguments").items()]
    if manifest.get("finished"):
        rows.append(("finished", str(manifest["finished"])))
    if run.facts("seconds"):
        rows.append(("seconds", _pairs(run.facts("seconds"))))
    memory = run.facts("peak_memory_bytes")
    if memory:
        rows.append(("peak memory", ", ".join(f"{k} {_bytes(v)}" for k, v in memory.items())))
    if run.facts("versions"):
        rows.append(("versions", _pairs(run.facts("versions"))))
    return Facts(rows)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return str(value)


def _bytes(value: object) -> str:
    return f"{value / 2**30:.2f} GiB" if isinstance(value, int | float) else str(value)
