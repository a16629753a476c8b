"""Checkpoints that hold more than the model of their config.json has a place for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import N_LAYERS, TinyDir, save_tokenizer
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration

from persona_nnsight import PersonaError, load_model

Change = Callable[[dict[str, Tensor]], object]

Q = "model.layers.0.self_attn.q_proj.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
LORA = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def directory(tmp_path: Path, tiny_dir: TinyDir) -> Callable[..., Path]:
    """A copy of a tiny model with other tensors and another config.json."""

    def make(family: str, change: Change = lambda _: None, **config: object) -> Path:
        path = shutil.copytree(tiny_dir(family), tmp_path / "model")
        weights = load_file(path / "model.safetensors")
        change(weights)
        save(weights, path / "model.safetensors")
        set_config(path, **config)
        return path

    return make


def save(weights: dict[str, Tensor], path: Path) -> None:
    own = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    save_file(own, path, metadata={"format": "pt"})


def set_config(path: Path, **changed: object) -> None:
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | changed), "utf-8")


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(PersonaError) as caught:
        load_model(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# -------------------------------------------------------------------- what would be left out


def adds(**tensors: Tensor) -> Change:
    return lambda weights: weights.update(tensors)


def with_lora(weights: dict[str, Tensor]) -> None:
    weights.update({LORA.format("A"): torch.ones(4, 32), LORA.format("B"): torch.ones(32, 4)})


def quantised(weights: dict[str, Tensor]) -> None:
    """Scales of a quantisation that config.json does not mention."""
    weights["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(64, 1)


#: By case: the family, the change of the tensors, that of config.json, and what is said.
LEFT_OUT: dict[str, tuple[str, Change, dict[str, object], str]] = {
    "a bias": ("llama", adds(**{Q_BIAS: torch.ones(32)}), {}, f"1 tensor that .* ({Q_BIAS})"),
    "a bias of zeros": ("llama", adds(**{Q_BIAS: torch.zeros(32)}), {}, "1 tensor that"),
    "a layer more": (
        "llama",
        lambda _: None,
        {"num_hidden_layers": N_LAYERS - 1},
        f"9 tensors that .* (model.layers.{N_LAYERS - 1}.input_layernorm.weight, ...)",
    ),
    "matrices of an adapter": ("llama", with_lora, {}, f"2 tensors that .* ({LORA.format('A')}"),
    "a quantisation's scale": ("llama", quantised, {}, "1 tensor that .* up_proj.weight_scale)"),
    "a mask that is none": (
        "gpt2",
        adds(**{"h.0.attn.masked_bias": torch.tensor(0.5)}),
        {},
        "1 tensor that .* (h.0.attn.masked_bias)",
    ),
    "a head of its own": (
        "qwen2",
        adds(**{"lm_head.weight": torch.ones(259, 32)}),
        {},
        "1 tensor with values of their own (lm_head.weight) that its config.json ties to "
        "model.embed_tokens.weight",
    ),
    "a head that is tied by mistake": (
        "llama",
        lambda _: None,
        {"tie_word_embeddings": True},
        "ti",
    ),
    "a tensor under two names": (
        "llama",
        adds(**{"norm.weight": torch.ones(32)}),
        {},
        "1 tensor twice with other values (norm.weight)",
    ),
    "integers without a scale": (
        "llama",
        lambda w: w.update({Q: (50 * w[Q]).to(torch.int8)}),
        {},
        f"1 tensor as I8 without the scale that belongs to it ({Q})",
    ),
    "8-bit floats without their scale": (
        "llama",
        lambda w: w.update({Q: w[Q].to(torch.float8_e4m3fn)}),
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        f"1 tensor as F8_E4M3 without the scale that belongs to it ({Q})",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_would_be_left_out_is_named(directory: Callable[..., Path], case: str) -> None:
    family, change, config, says = LEFT_OUT[case]
    message = refusal(directory(family, change, **config))
    at = 0
    for part in says.split(" .* "):
        assert part in message[at:], message
        at = message.index(part, at)


# ---------------------------------------------------------------- what nothing was learned of


def masked(weights: dict[str, Tensor]) -> None:
    """What GPT-2, GPT-J and GPT-NeoX stored in every layer."""
    mask = torch.ones(1, 1, 1024, 1024).tril()
    weights["transformer.h.0.attn.bias"] = mask
    weights["transformer.h.0.attn.attention.causal"] = mask.to(torch.uint8)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)


def doubled(weights: dict[str, Tensor]) -> None:
    weights["norm.weight"] = weights["model.norm.weight"]


def rotary(weights: dict[str, Tensor]) -> None:
    frequencies = 10000 ** -(torch.arange(0, 8, 2) / 8)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies
    weights["model.layers.1.self_attn.rope.inv_freq"] = frequencies.bfloat16()
    weights["model.positions"] = torch.arange(4096)[None]


HARMLESS: dict[str, tuple[str, Change]] = {
    "masks": ("gpt2", masked),
    "rotary frequencies and positions": ("llama", rotary),
    "a tied head stored twice": (
        "qwen2",
        lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}),
    ),
    "a tensor under two names": ("llama", doubled),
    "8-bit floats that are no quantised ones": (
        "llama",
        lambda w: w.update({Q: w[Q].to(torch.float8_e4m3fn)}),
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_the_model_makes_itself_may_be_stored(
    directory: Callable[..., Path], case: str
) -> None:
    family, change = HARMLESS[case]
    assert load_model(str(directory(family, change))).has_weights


def test_what_the_model_sees_with_is_not_needed_for_texts(tmp_path: Path) -> None:
    """transformers loads Llama 4's text model alone; what it sees with has a place in the whole."""
    text = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": 2, "pad_token_id": 258,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "image_size": 28,
        "num_attention_heads": 4, "patch_size": 14, "vision_output_dim": 32,
        "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    config = Llama4Config(text_config=text, vision_config=vision)
    whole: Any = Llama4ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert type(load_model(str(tmp_path)).lm._module).__name__ == "Llama4ForCausalLM"
    weights = load_file(tmp_path / "model.safetensors")
    bias = "language_model.model.layers.0.self_attn.q_proj.bias"
    save(weights | {bias: torch.ones(32)}, tmp_path / "model.safetensors")
    assert f"1 tensor that the model of its config.json has no place for ({bias})" in refusal(
        tmp_path
    )


# ---------------------------------------------------------------------- files that nothing reads


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_model(
    directory: Callable[..., Path], name: str, weights: bool
) -> None:
    path = directory("llama")
    (path / name).write_text("{}")
    message = refusal(path, weights=weights)
    assert f"holds an adapter ({name}), which would not be applied; merge it" in message


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json)" in refusal(tmp_path)


def test_a_shard_that_no_index_names(directory: Callable[..., Path]) -> None:
    path = directory("llama")
    save({"model.layers.5.mlp.up_proj.weight": torch.ones(64, 32)}, path / "model-2.safetensors")
    message = refusal(path)
    assert "1 file of weights that would not be read (model-2.safetensors)" in message
    (path / "model-2.safetensors").write_bytes(b"no safetensors")
    assert "would not be read (model-2.safetensors)" in refusal(path)


def test_a_copy_in_another_layout_may_stay(directory: Callable[..., Path]) -> None:
    """As Mistral's repositories have it; of shards the copy may be one file."""
    path = directory("mistral")
    weights = load_file(path / "model.safetensors")
    save({f"layers.{name}": tensor for name, tensor in weights.items()}, path / "all.safetensors")
    assert load_model(str(path)).has_weights
    names, shards = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2])):
        shards.update(dict.fromkeys(part, f"model-{number}.safetensors"))
        save({name: weights[name] for name in part}, path / f"model-{number}.safetensors")
    (path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": shards}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_model(str(path)).has_weights
    save({"more": torch.ones(1)}, path / "more.safetensors")
    assert "2 files of weights that would not be read (all.safetensors)" in refusal(path)


def test_a_tensor_in_two_shards(directory: Callable[..., Path]) -> None:
    path = directory("llama")
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    shards = dict.fromkeys(weights, "model-1.safetensors") | {Q: "model-2.safetensors"}
    index = {"metadata": {}, "weight_map": shards}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    save({Q: weights[Q]}, path / "model-2.safetensors")
    assert load_model(str(path)).has_weights
    save({Q: weights[Q] + 1}, path / "model-2.safetensors")
    assert f"1 tensor twice with other values ({Q})" in refusal(path)


def test_weights_of_another_name(directory: Callable[..., Path]) -> None:
    path = directory("llama", transformers_weights="other.safetensors")
    assert "names its weights 'other.safetensors' (transformers_weights)" in refusal(path)
