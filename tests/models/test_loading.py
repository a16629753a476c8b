"""Loading: layer maps, dtypes, devices, and models that cannot be used."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.random_models import SPECIAL, random_model
from cells import TINY_GRID, cell_prompts, lookup, reference_of
from reference import decomposition, vector
from studies import study_of
from tiny import FAMILIES, N_LAYERS, Tiny, TinyDir, make_model_dir
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from persona_nnsight import CaptureResult, PersonaError, capture, load_model, substitute
from persona_nnsight.engine import residual_writes
from persona_nnsight.experiments.capture import Capture
from persona_nnsight.experiments.execution import execute_together
from persona_nnsight.experiments.steer import Steer
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.method.edit_vectors import seeded_noise
from persona_nnsight.models.loading import stay
from persona_nnsight.models.module_tree import find_tree

LAYER_PATHS = {
    "gemma3_vlm": "model.language_model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_map(tiny: Tiny, family: str) -> None:
    tree = tiny(family).tree
    assert tree.layers == LAYER_PATHS.get(family, "model.layers")
    assert (tree.n_layers, tree.d_model) == (N_LAYERS, 32)


def test_an_unknown_tree_says_what_was_looked_for() -> None:
    config = SimpleNamespace(num_hidden_layers=3)
    config.get_text_config = lambda **_: config
    model: Any = torch.nn.Module()
    model.config = config
    model.blocks = torch.nn.ModuleList([torch.nn.Identity()] * 2)
    with pytest.raises(PersonaError, match=r"one list of 3 modules .* lists here are blocks \(2\)"):
        find_tree(model, torch.float32)
    model.left = torch.nn.ModuleList([torch.nn.Identity()] * 3)
    model.right = torch.nn.ModuleList([torch.nn.Identity()] * 3)
    with pytest.raises(PersonaError, match=r"left \(3\), right \(3\)"):
        find_tree(model, torch.float32)


def test_a_skeleton_knows_what_the_model_knows(tiny_dir: TinyDir, tiny: Tiny) -> None:
    skeleton = load_model(str(tiny_dir("gemma3_vlm")), weights=False)
    loaded = tiny("gemma3_vlm")
    assert skeleton.tree == loaded.tree
    assert skeleton.n_parameters == loaded.n_parameters
    assert {parameter.device.type for parameter in skeleton.lm._module.parameters()} == {"meta"}
    with pytest.raises(PersonaError, match="without weights"):
        capture(skeleton, TINY_GRID)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_low_precision(tiny_dir: TinyDir, family: str, dtype: str) -> None:
    """Residuals and KLs are the oracle's in the same dtype."""
    model = load_model(str(tiny_dir(family)), dtype=dtype)
    reference = reference_of(model)
    grid = TINY_GRID.select(["chef"], ["haiku"])
    result = substitute(model, grid, layers=(3,), positions="p_last", conditions=["bb", "clean"])
    captured = capture(model, grid, layers=(3,), positions="p_last")
    assert captured.residuals["XY"].dtype == torch.float32
    prompts = cell_prompts(TINY_GRID, grid.cells[0])
    expected = reference.cell_residuals(prompts, "p_last", 3, [])
    eps = torch.finfo(getattr(torch, dtype)).eps
    for key in ("BB", "XB", "BY", "XY"):
        scale = expected[key].abs().max()
        difference = (captured.residuals[key][0, 0, 0] - expected[key]).abs().max()
        assert difference < 16 * eps * scale, key
    found = lookup(result)
    bb = found[("chef", "haiku", "bb", "p_last", "3")][0]
    clean = found[("chef", "haiku", "clean", "p_last", "3")][0]
    continuation = list(result.continuations[0])
    greedy = reference.continuation(prompts, ["p_last"])
    ids = reference.ids(prompts["XY"])
    for step, (mine, other) in enumerate(zip(continuation, greedy, strict=True)):
        if mine != other:  # which of two logits is larger, rounding may decide
            logits = reference._logits([*ids, *greedy[:step]])[-1]
            assert float(logits[other] - logits[mine]) < 16 * eps * float(logits.abs().max())
            break
    score = reference.substitution_kl(prompts, "p_last", 3, "bb", continuation)
    assert bb == pytest.approx(score.kl, rel=0.05)
    assert abs(clean) < 0.02 * bb


def written_by(condition: str, h: dict[str, Tensor], noise: Tensor) -> Tensor:
    """The formulas of docs/method.md §5 and §6, with α = 0.3 and β = 1.7, in the dtype of `h`."""
    if condition == "steer":
        return h["BB"] + 0.3 * (h["XB"] - h["BB"]) + 1.7 * (h["BY"] - h["BB"])
    if condition == "random":
        drawn: Tensor = h["BB"] + noise * ((h["XY"] - h["BB"]).norm() / noise.norm())
        return drawn
    return vector(condition, h)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_arithmetic_of_residuals(
    tiny_dir: TinyDir, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the formula's value, rounded once to the model's dtype."""
    model = load_model(str(tiny_dir("llama")), dtype=dtype)
    low = getattr(torch, dtype)
    # Every persona has a cell, which shows the residual that another's `other_x` reads.
    grid = TINY_GRID.select(tasks=["haiku"])
    site: dict[str, Any] = {"layers": (3,), "positions": "p_last"}
    conditions = ("additive", "remove_x", "remove_y", "other_x", "random")
    written: list[Tensor] = []
    write = residual_writes._write

    def seen(where: Any, vectors: Any, hidden: Tensor) -> None:
        write(where, vectors, hidden)
        # Behind the edited rows stand unedited ones.
        tokens = where["p_last"]
        written.extend(hidden[torch.arange(len(tokens)), tokens].clone())

    monkeypatch.setattr(residual_writes, "_write", seen)
    # In one pass, so that the residuals are those that the vectors were made of.
    captured, *edited = execute_together(
        model,
        [
            study_of(grid, experiment.plan(model, grid))
            for experiment in (
                Capture(**site),
                Substitute(**site, conditions=conditions),
                Steer(**site, alpha="0.3", beta="1.7"),
            )
        ],
    )
    assert isinstance(captured, CaptureResult)
    assert {vector.dtype for vector in written} == {low}
    assert len(written) == sum(len(each.scores) for each in edited)
    h = {key: value[:, 0, 0] for key, value in captured.residuals.items()}
    n = len(grid.cells)
    residuals = [{key: value[cell] for key, value in h.items()} for cell in range(n)]
    expected, telling = [], set()
    for cell, own in enumerate(residuals):
        own["X'B"] = residuals[(cell + 1) % n]["XB"]
        noise = seeded_noise(edited[0].plan.cells[cell].seed, "p_last", 3, 32)
        expected.append(own["BB"].to(low))  # the control of a steering
        rounded = own["XY"] * (1 + noise.sign() * torch.finfo(low).eps / 2)
        expected += [own["XY"].to(low), rounded.to(low)] * 2  # beside both experiments
        for condition in (*conditions, "steer"):
            expected.append(written_by(condition, own, noise).to(low))
            coarse = written_by(condition, {k: v.to(low) for k, v in own.items()}, noise)
            if not torch.equal(expected[-1], coarse.to(low)):
                telling.add(condition)
    # Arithmetic in the model's dtype writes something else, but where differences are exact.
    assert telling >= {"additive", "other_x", "random", "steer"}
    assert sorted(v.tolist() for v in written) == sorted(v.tolist() for v in expected)
    for row, own in zip(captured.geometry.to_dict("records"), residuals, strict=True):
        for name, value in decomposition({k: v.double() for k, v in own.items()}).items():
            assert row[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize(
    ("dtype", "way_out"), [("float16", "--dtype bfloat16"), ("bfloat16", "--dtype float32")]
)
def test_a_residual_that_overflows(
    tmp_path: Path, tiny_dir: TinyDir, dtype: str, way_out: str
) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_model_dir("llama", tmp_path / "overflowing")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1e6 if dtype == "float16" else 1e38
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model = load_model(str(directory), dtype=dtype)
    with pytest.raises(PersonaError) as caught:
        substitute(model, TINY_GRID, layers=(1, 3), positions="p_last,g1")
    message = str(caught.value)
    for part in ("not finite", "layer 3", "position p_last", dtype, way_out):
        assert part in message, message
    # Above the asked layers the overflow still shows, in the logits.
    expected = (
        f"XY prompt .* not finite at layer 3, position before p_last in {dtype}; use {way_out}"
    )
    for command in (substitute, capture):
        with pytest.raises(PersonaError, match=expected):
            command(model, TINY_GRID, layers=(1,), positions="p_last,g1")
    # And above the last residual, where no layer is to be blamed.
    weights["model.layers.2.mlp.down_proj.weight"] *= 0
    weights["lm_head.weight"] *= 1e6 if dtype == "float16" else 3e38
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model = load_model(str(directory), dtype=dtype)
    with pytest.raises(PersonaError, match=f"not finite after layer 4 in {dtype}; use {way_out}"):
        capture(model, TINY_GRID, layers=(1,), positions="p_last,g1")


def test_auto_dtype_is_float32_on_a_cpu(tiny: Tiny) -> None:
    model = tiny("llama")
    assert (model.dtype, model.device) == (torch.float32, "cpu")


@pytest.mark.parametrize("made", ["loaded", "random"])
def test_a_model_stays_on_the_device_that_was_asked_for(
    tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    """Where there is a GPU, transformers' pipelines would move every model to it."""
    moves: list[Any] = []

    def move(module: Any, *where: Any, **_: Any) -> Any:
        moves.append(where)
        return module

    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "to", move)
    if made == "loaded":
        model = load_model(str(tiny_dir("llama")), device="cpu")
    else:
        config = LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=512, **SPECIAL)
        model = random_model("tiny", config, ["a text"], device="cpu")
    assert moves == []
    assert model.lm.pipeline.device == torch.device("cpu")
    assert {parameter.device.type for parameter in model.lm._module.parameters()} == {"cpu"}


def test_a_model_on_several_devices_is_not_told_one() -> None:
    shared: Any = SimpleNamespace(hf_device_map={"a": 0, "b": 1}, device=torch.device("cuda:0"))
    assert stay(shared) == {}


def test_gemma_2_computes_its_soft_cap(tiny: Tiny, tiny_dir: TinyDir) -> None:
    assert tiny("gemma2").attention == "eager"
    assert tiny("llama").attention == "sdpa"
    assert load_model(str(tiny_dir("llama")), attn="eager").attention == "eager"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda"}, "needs a CUDA GPU"),
        ({"device": "cuda:1"}, "needs a CUDA GPU"),
        ({"device": "balanced"}, "needs a CUDA GPU"),
        ({"device": "mps"}, "'mps' is not available"),
        ({"device": "gpu"}, "'gpu' is not known; use auto, cpu, cuda"),
        ({"dtype": "half"}, "'half' is not known; use auto, float32"),
        ({"attn": "quick"}, "'quick' is not known; use eager, sdpa"),
        ({"attn": "flash_attention_2"}, "cannot be loaded"),
        ({"revision": "main"}, "for a hub id only"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_bad_options(tiny_dir: TinyDir, options: dict[str, str], says: str) -> None:
    with pytest.raises(PersonaError) as caught:
        load_model(str(tiny_dir("llama")), **options)  # type: ignore[arg-type]
    assert says in str(caught.value)


def test_arguments_of_any_kind(tiny: Tiny) -> None:
    """Iterators are read once, and every list may be written with commas."""
    model = tiny("llama")
    grid = TINY_GRID.select(["yoda"], ["haiku"])
    asked = substitute(
        model,
        grid,
        layers=(layer for layer in (2, 3)),
        positions=(name for name in ("p_last", "g1")),
        conditions=(name for name in ("bb", "additive")),
    )
    written = substitute(
        model, grid, layers="2,3", positions="p_last, g1", conditions="additive, bb"
    )
    assert asked.plan == written.plan
    assert len(asked.frame()) == 3 * 2 * 2  # `clean` too
    with pytest.raises(PersonaError, match="Condition 'magic' does not exist"):
        substitute(model, grid, conditions="additive,magic")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_model_dir("llama", tmp_path / "incomplete")
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if "layers.1.mlp" in name]:
        del weights[name]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        PersonaError, match=r"lack 3 of the model's tensors \(model\.layers\.1\.mlp"
    ):
        load_model(str(directory))


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    from tiny import save_tokenizer
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=259, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    model: Any = BartForConditionalGeneration(config)
    model.save_pretrained(str(tmp_path))
    save_tokenizer(tmp_path)
    with pytest.raises(PersonaError, match="encoder-decoder"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", ["mamba", "rwkv", "xlstm"])
def test_a_model_of_another_kind_loads_or_is_one_sentence(
    tmp_path: Path, kind: str, weights: bool
) -> None:
    from tiny import save_tokenizer
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2}
    if kind == "xlstm":
        sizes["num_heads"] = 4
    config = CONFIG_MAPPING[kind](**sizes)
    auto: Any = AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with suppress(PersonaError):
        assert load_model(str(tmp_path), weights=weights).tree.n_layers == 2


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("part", ["find_tree", "observed", "end_tokens", "class_of", "_options"])
def test_whatever_fails_is_one_sentence(
    tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch, part: str, weights: bool
) -> None:
    def fail(*_: object) -> None:
        raise AttributeError("this kind has no heads\nnor tails")

    monkeypatch.setattr(f"persona_nnsight.models.loading.{part}", fail)
    with pytest.raises(PersonaError, match=r"cannot be loaded \(this kind has no heads\); check"):
        load_model(str(tiny_dir("llama")), weights=weights)


def test_broken_directories(tmp_path: Path) -> None:
    directory = make_model_dir("llama", tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(PersonaError, match="cannot be loaded"):
        load_model(str(directory))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(PersonaError, match="tokenizer"):
        load_model(str(directory))
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = "unheard_of"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(PersonaError, match="cannot be loaded"):
        load_model(str(directory))


def test_a_tower_of_as_many_layers_is_not_taken_for_the_decoder() -> None:
    from transformers import GraniteConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    vision: dict[str, Any] = {
        **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64},
        "num_hidden_layers": N_LAYERS,
        **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 32},
    }
    text = GraniteConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=N_LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    config = VideoLlavaConfig(text_config=text, vision_config=vision)
    build: Any = VideoLlavaForConditionalGeneration
    with torch.device("meta"):
        model = build(config)
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    }
    assert list(lists.values()).count(N_LAYERS) > 1
    assert find_tree(model, torch.float32).layers == "model.language_model.layers"
