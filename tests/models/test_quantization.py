"""Quantised checkpoints: what can be undone here is, and the rest is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cells import TINY_GRID
from commands import Persona
from safetensors.torch import load_file, save_file
from tiny import make_model_dir
from torch import Tensor

from persona_nnsight import PersonaError, capture, load_model

BLOCK = 16


def with_quantization(directory: Path, settings: dict[str, object]) -> Path:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = settings
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "magic"])
def test_what_cannot_be_loaded(tmp_path: Path, method: str) -> None:
    """None of these packages is a dependency; the last method is made up."""
    settings: dict[str, object] = {"quant_method": method, "bits": 4, "group_size": 32}
    if method == "bitsandbytes":
        settings = {"quant_method": method, "load_in_4bit": True}
    directory = with_quantization(make_model_dir("llama", tmp_path / "model"), settings)
    with pytest.raises(PersonaError, match=f"are quantised by '?{method}'?"):
        load_model(str(directory))


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in blocks of eight-bit floats, and the scale of each block."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    small = (blocks / scale[:, None, :, None]).reshape(rows, columns)
    return small.to(torch.float8_e4m3fn), scale


def restored(small: Tensor, scale: Tensor) -> Tensor:
    rows, columns = small.shape
    blocks = small.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    return (blocks * scale[:, None, :, None]).reshape(rows, columns)


def test_eight_bit_floats_are_what_they_stand_for(tmp_path: Path, persona: Persona) -> None:
    plain = make_model_dir("llama", tmp_path / "plain")
    packed = make_model_dir("llama", tmp_path / "packed")
    weights = load_file(plain / "model.safetensors")
    small, exact = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            small[name], scale = quantised(weight)
            small[f"{name}_scale_inv"] = scale
            exact[name] = restored(small[name], scale)
    for directory, tensors in ((plain, exact), (packed, small)):
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with_quantization(
        packed,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"],
        },
    )
    found, expected = (
        capture(load_model(str(directory)), TINY_GRID, layers=(1, 4), positions="p_last")
        for directory in (packed, plain)
    )
    for key in ("BB", "XY"):
        assert torch.equal(found.residuals[key], expected.residuals[key])
    run = ("capture", "-m", str(packed), "--grid", "grid.yaml", "--layers", "2", "--out", "out")
    assert persona(*run).code == 0
    assert json.loads(Path("out/run.json").read_text())["model"]["quantization"] == "fp8"
