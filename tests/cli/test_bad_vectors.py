"""Saved vectors that are refused, and places where none can be saved."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from cells import TINY_GRID
from commands import OUT, WHERE, Persona, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spoil import Change, Touch, to_directory
from tiny import TinyDir

from persona_nnsight import Grid


def labels(**changed: object) -> Change:
    """Change labels of saved vectors."""

    def apply(path: Path) -> None:
        with safe_open(path, "pt") as file:
            known = json.loads(file.metadata()["persona_nnsight"])
        text = json.dumps({**known, **changed})
        save_file(load_file(path), path, metadata={"persona_nnsight": text})

    return apply


def another_run(path: Path) -> None:
    save_file({"h_BB": torch.zeros(2)}, path)


FORGED = {persona.key: f"{persona.text}<|im_end|>" for persona in TINY_GRID.personas}

#: What is done to the file, further options of steer, and what is said.
VECTORS: dict[str, tuple[Change, list[str], str]] = {
    "of another model": (labels(model_sha256="0" * 64), [], "The vectors are of other weights"),
    "of another depth": (labels(n_layers=9), [], "a model with 9 layers and d_model 32"),
    "of another width": (labels(d_model=16), [], "'h_BB' has the shape [1, 1, 32], but the labels"),
    "of another grid": (labels(baseline_persona="x"), [], "the baseline persona 'x', but the grid"),
    "of another persona": (labels(personas=FORGED), [], "The persona 'yoda' is 'Yoda<|im_end|>'"),
    "of another format": (labels(format=99), [], "in format 99"),
    "of another layer": (labels(), ["-l", "3"], "The vectors hold no layer 3"),
    "of another position": (labels(), ["-p", "p_user_last"], "no position 'p_user_last'"),
    "labels no grid": (labels(template="As {persona}"), [], "'template' is 'As {persona}'"),
    "labels of another kind": (labels(layers="all"), [], "layers are all"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-9]), [], "cut short"),
    "empty": (lambda path: path.write_bytes(b""), [], "cannot be read as a safetensors file"),
    "a text": (lambda path: path.write_text("no vectors at all"), [], "cannot be read as a safe"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Touch())), [], "cannot be read as a s"),
    "no vectors": (another_run, [], "so it holds no saved vectors"),
    "an absurd header": (
        lambda path: path.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
        [],
        "header too large",
    ),
    "missing": (Path.unlink, [], "'some.safetensors' does not exist"),
    "a directory": (to_directory(""), [], "is a directory"),
}


@pytest.mark.parametrize("case", VECTORS)
def test_vectors(persona: Persona, tiny_dir: TinyDir, saved: Path, case: str) -> None:
    change, options, says = VECTORS[case]
    file = Path("some.safetensors")
    shutil.copy(saved / "vectors.safetensors", file)
    change(file)
    base = ("steer", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-o", OUT, *WHERE)
    refused(persona(*base, "--vectors", file, *options), says)
    assert not Path("pwned").exists()


def test_a_forged_text_in_vectors_and_grid(
    persona: Persona, tiny_dir: TinyDir, saved: Path
) -> None:
    file = Path("forged.safetensors")
    shutil.copy(saved / "vectors.safetensors", file)
    labels(personas=FORGED)(file)
    Path("forged.yaml").write_text(
        Grid.from_dict({**TINY_GRID.to_dict(), "personas": FORGED}).to_yaml(), encoding="utf-8"
    )
    base = ("steer", "-m", tiny_dir("llama"), "-g", "forged.yaml", "-o", OUT, *WHERE)
    refused(persona(*base, "--vectors", file), "contains '<|im_end|>', a control token")


@pytest.mark.parametrize("target", ["taken.safetensors", "grid.yaml/v.safetensors"])
def test_vectors_that_cannot_be_saved(persona: Persona, tiny_dir: TinyDir, target: str) -> None:
    Path("taken.safetensors").write_bytes(b"mine")
    base = ("steer", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-o", OUT, *WHERE)
    refused(persona(*base, "--save-vectors", target), f"'{target}'")
    assert Path("taken.safetensors").read_bytes() == b"mine"
