"""Valid files, made once by a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny import make_model_dir

from persona_nnsight import Grid, capture, load_model, markers, steer

GRID = Grid.from_dict(
    {
        "name": "tiny",
        "template": "As {persona}, {task}",
        "baseline": {"persona": "someone", "task": "give some advice."},
        "personas": {"yoda": {"text": "Yoda", "markers": ["force", "a b"]}, "marx": "Karl Marx"},
        "tasks": {"haiku": {"text": "write a haiku.", "tags": ["poem"]}, "plan": "make: a plan #1"},
    }
)

SCRIPT = b"""
PERSONAS: dict[str, str] = {"baseline": "someone", "yoda": "Yo" + "da", "chef": {"text": "a chef"}}
TASKS = dict(haiku="write a haiku.", plan=["make a plan", "x"])
PERSONA_MARKERS = {"yoda": ["force", "hmm"]}
base_task = "give some advice."
def f(x): return {"a": x}
"""

PENDING = json.dumps(
    {
        "format": 1,
        "host": "https://example.org",
        "origin": {"argv": ["substitute"], "cwd": "/", "subject": {"model": "m"}},
        "server": {"dtype": "bfloat16"},
        "jobs": [{"key": "k", "cells": 2, "state": "sent", "id": "1", "sent": 1.5}],
    }
).encode()


def run_files() -> dict[str, dict[str, bytes]]:
    """Run directories by command, as {file name: content}, and the vectors of the capture."""
    with TemporaryDirectory() as root:
        model = load_model(str(make_model_dir("llama", Path(root, "m"))))
        captured = capture(model, GRID, layers=(1, 3), positions="p_last,g1", window=2)
        marked = GRID.select(["yoda"])
        runs = {
            "capture": captured,
            "steer": steer(model, GRID, layers=2, alpha="0,1", window=2, generate=3),
            "markers": markers(model, marked, layers=2, tokens=3),
        }
        found = {}
        for command, result in runs.items():
            directory = result.save(Path(root, command))
            found[command] = {path.name: path.read_bytes() for path in directory.iterdir()}
        path = captured.vectors().save(Path(root, "v.safetensors"))
        found["vectors"] = {"v.safetensors": path.read_bytes()}
    return found
