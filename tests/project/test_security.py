"""What is not trusted does nothing: a checkpoint's code, pickles, and what could hold a secret."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nnsight
import pandas as pd
import pytest
import torch
import zstandard
from cells import MARKED
from commands import Outcome, Persona, assert_one_sentence
from fake_ndif import DONE, KEY, FakeNdif, Reply, share_ssl_context, stop_clocks
from persona_cli.app import app
from tiny import Tiny, TinyDir

from persona_nnsight import PersonaError, capture, load_model, markers
from persona_nnsight.models.weights.resolve import resolve

ROOT = Path(__file__).parents[2]

TOKEN = "hf_canary77c1e5b9"
"""A hub token that must not turn up anywhere."""


SMALL = (
    *("-g", "grid.yaml", "--personas", "yoda", "--tasks", "haiku"),
    *("-l", 2, "-p", "p_last", "--conditions", "additive,bb", "--window", 2),
)


@pytest.fixture
def fake(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNdif]:
    """A server that computes; the API key, and a hub token, are in the environment."""
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    share_ssl_context(monkeypatch)
    stop_clocks(monkeypatch)
    with FakeNdif(tiny("llama")) as server:
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.url)
        yield server


# ------------------------------------------------------------------- code that is a checkpoint's


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A place of its own for the copies of checkpoints' code that transformers makes."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_dir: TinyDir, modules_cache: None) -> Path:
    """The tiny Llama as an architecture of its own, whose code leaves `ran` beside the model."""
    directory = tmp_path / "own"
    shutil.copytree(tiny_dir("llama"), directory)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    change_json(directory / "config.json", model_type="own", auto_map=auto_map)
    (directory / "configuration_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
    )
    (directory / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n"
    )
    return directory


def change_json(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize("weights", [False, True])
def test_code_of_a_checkpoint_is_not_run(checkpoint: Path, weights: bool) -> None:
    with pytest.raises(PersonaError, match=r"was not run; .* --trust-remote-code"):
        load_model(str(checkpoint), weights=weights)
    assert not (checkpoint.parent / "ran").exists()


def test_code_of_a_tokenizer_is_not_run(checkpoint: Path, tiny_dir: TinyDir) -> None:
    shutil.copy(tiny_dir("llama") / "config.json", checkpoint)
    change_json(
        checkpoint / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "configuration_own.OwnTokenizer"]},
    )
    with pytest.raises(PersonaError, match="was not run"):
        load_model(str(checkpoint))
    assert not (checkpoint.parent / "ran").exists()


def test_code_is_not_run_where_transformers_has_its_own(checkpoint: Path) -> None:
    change_json(checkpoint / "config.json", model_type="llama")
    load_model(str(checkpoint))
    assert not (checkpoint.parent / "ran").exists()


def test_the_command_refuses_and_leaves_nothing(checkpoint: Path, persona: Persona) -> None:
    assert_one_sentence(outcome := persona("substitute", "-m", checkpoint, *SMALL, "-o", "run"))
    assert "--trust-remote-code" in outcome.err
    assert not (checkpoint.parent / "ran").exists()
    assert not Path("run").exists()


def test_trusted_code_runs_and_is_recorded(
    checkpoint: Path, persona: Persona, tiny_dir: TinyDir
) -> None:
    trusted = persona("substitute", "-m", checkpoint, *SMALL, "-o", "run", "--trust-remote-code")
    assert trusted.code == 0, trusted.err
    assert (checkpoint.parent / "ran").exists()
    assert persona("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "same").code == 0
    ours, same = (pd.read_csv(f"{name}/kl.csv") for name in ("run", "same"))
    pd.testing.assert_frame_equal(ours, same)
    said = {
        name: json.loads(Path(name, "run.json").read_text())["model"] for name in ("run", "same")
    }
    assert {name: model["trust_remote_code"] for name, model in said.items()} == {
        "run": True,
        "same": False,
    }
    assert persona("report", "run").code == 0
    assert "code of the checkpoint" in Path("run/report.html").read_text()


def test_the_fingerprint_follows_the_code(checkpoint: Path) -> None:
    before = resolve(str(checkpoint)).sha256
    with (checkpoint / "modeling_own.py").open("a") as file:
        file.write("# changed\n")
    assert resolve(str(checkpoint)).sha256 != before


def test_code_of_another_repository_is_refused(checkpoint: Path) -> None:
    auto_map = {"AutoConfig": "someone/else--configuration_own.OwnConfig"}
    change_json(checkpoint / "config.json", auto_map=auto_map)
    with pytest.raises(PersonaError, match=r"from another repository \(someone/else\)"):
        load_model(str(checkpoint), trust_remote_code=True)
    assert not (checkpoint.parent / "ran").exists()


def test_a_chat_template_reaches_nothing(
    persona: Persona, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    shutil.copytree(tiny_dir("llama"), "model")
    Path("model/chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "ran") + "') }}"
    )
    assert_one_sentence(persona("substitute", "-m", "./model", *SMALL, "-o", "run"))
    assert not (tmp_path / "ran").exists()


def test_no_code_is_trusted_for_a_server(
    checkpoint: Path, persona: Persona, fake: FakeNdif
) -> None:
    there = ("--backend", "ndif", "--ndif-host", fake.url, "--trust-remote-code")
    assert_one_sentence(refused := persona("substitute", "-m", checkpoint, *SMALL, *there))
    assert "--trust-remote-code is for this machine" in refused.err
    assert not (checkpoint.parent / "ran").exists()
    assert fake.seen == []


def test_a_directory_does_not_say_whose_code_is_trusted(
    checkpoint: Path,
    persona: Persona,
    fake: FakeNdif,
    tiny_dir: TinyDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs of somebody else's, whose record names a checkpoint and the option."""
    fake.scripts = [(("QUEUED", ""), *DONE)]
    there = ("--backend", "ndif", "--ndif-host", fake.url, "--detach")
    assert persona("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "run", *there).code == 0
    with monkeypatch.context() as full:
        full.setattr("persona_nnsight.experiments.results.run_manifest", _no_space)
        assert persona("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "local").code == 2
    for out in ("run", "local"):
        pending = json.loads(Path(out, "pending.json").read_text())
        argv = ["substitute", "-m", checkpoint, *SMALL, "--trust-remote-code"]
        pending["origin"]["argv"] = [str(word) for word in argv]
        Path(out, "pending.json").write_text(json.dumps(pending))
        assert_one_sentence(refused := persona("resume", out))
        assert "if you trust that code, add --trust-remote-code" in refused.err
        assert not (checkpoint.parent / "ran").exists()
    assert persona("resume", "local", "--trust-remote-code").code == 2  # another model
    assert (checkpoint.parent / "ran").exists()


def _no_space(**_: object) -> None:
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------------- pickles


class Malice:
    """Makes a file in the process that unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def malicious(kind: str, marker: Path, path: Path) -> None:
    """Write a pickle that makes `marker`, as Python, torch or old torch writes it."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Malice(marker)))
    else:
        torch.save({"model": Malice(marker)}, path, _use_new_zipfile_serialization=kind == "torch")


PICKLES = ["pickle", "torch", "old torch"]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.mark.parametrize("kind", PICKLES)
def test_the_payload_works(kind: str, marker: Path, tmp_path: Path) -> None:
    malicious(kind, marker, tmp_path / "file")
    if kind == "pickle":
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert marker.exists()


@pytest.fixture(scope="module")
def a_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have every kind of file."""
    root = tmp_path_factory.mktemp("run")
    capture(tiny("llama"), MARKED, layers=[1, 2], positions="p_last").save(root / "capture")
    markers(tiny("llama"), MARKED, layers=[2], tokens=4).save(root / "markers")
    return root


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("capture", "run.json"),
        ("capture", "geometry.csv"),
        ("markers", "text.jsonl"),
        ("markers", "markers.csv"),
        ("markers", "summary.csv"),
    ],
)
def test_a_run_with_a_pickle_in_it(
    kind: str, run: str, name: str, a_run: Path, marker: Path, persona: Persona
) -> None:
    shutil.copytree(a_run / run, "run")
    assert Path("run", name).exists()
    malicious(kind, marker, Path("run", name))
    refused = persona("report", "run")
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith("persona: ")
    assert "Traceback" not in refused.err
    assert not marker.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_residuals_that_are_a_pickle(
    kind: str, a_run: Path, marker: Path, persona: Persona
) -> None:
    shutil.copytree(a_run / "capture", "run")
    malicious(kind, marker, Path("run/residuals.safetensors"))
    assert persona("report", "run").code == 0  # which does not read them
    assert_one_sentence(persona("vectors", "run/residuals.safetensors"))
    assert not marker.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_vectors_that_are_a_pickle(
    kind: str, marker: Path, persona: Persona, tiny_dir: TinyDir
) -> None:
    malicious(kind, marker, Path("vectors.safetensors"))
    assert_one_sentence(persona("vectors", "vectors.safetensors"))
    assert_one_sentence(
        persona(
            *("steer", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-l", "2"),
            *("--vectors", "vectors.safetensors", "-o", "run"),
        )
    )
    assert not marker.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_model_that_is_a_pickle(
    kind: str, marker: Path, persona: Persona, tiny_dir: TinyDir
) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "shards"):
        shutil.copytree(tiny_dir("llama"), name)
        Path(name, "model.safetensors").unlink()
        malicious(kind, marker, Path(name, "pytorch_model.bin" if name == "shards" else name))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    malicious(kind, marker, Path("model.gguf"))
    for spec in ("./model.safetensors", "./pytorch_model.bin", "./shards", "./model.gguf"):
        assert_one_sentence(persona("substitute", "-m", spec, *SMALL, "-o", "run"))
        assert not marker.exists()
    assert "is a pickle, which is never loaded" in (
        persona("substitute", "-m", "./pytorch_model.bin", *SMALL, "-o", "run").err
    )


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_beside_a_model_are_left_alone(
    kind: str, marker: Path, tmp_path: Path, tiny_dir: TinyDir
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_dir("llama"), directory)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        malicious(kind, marker, directory / name)
    assert load_model(str(directory)).has_weights
    assert not marker.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_part_that_is_a_pickle(
    kind: str, marker: Path, persona: Persona, fake: FakeNdif, tiny_dir: TinyDir
) -> None:
    """It counts as missing, so its job is sent again."""
    run = ("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "run")
    fake.scripts = [(("QUEUED", ""), *DONE)]
    assert persona(*run, "--backend", "ndif", "--ndif-host", fake.url, "--detach").code == 0
    pending = json.loads(Path("run/pending.json").read_text())
    (job,) = pending["state"]["jobs"]
    job["state"] = "done"
    Path("run/pending.json").write_text(json.dumps(pending))
    Path("run/parts").mkdir(exist_ok=True)
    malicious(kind, marker, Path("run/parts", f"{job['key']}.safetensors"))
    outcome = persona("resume", "run")
    assert outcome.code == 0, outcome.err
    assert fake.posts == 2
    assert not marker.exists()


@pytest.mark.parametrize("kind", [*PICKLES, "yaml"])
def test_a_grid_that_would_run_something(
    kind: str, marker: Path, persona: Persona, tiny_dir: TinyDir
) -> None:
    if kind == "yaml":
        Path("bad.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{marker}']\n")
    else:
        malicious(kind, marker, Path("bad.yaml"))
    assert_one_sentence(
        persona("substitute", "-m", tiny_dir("llama"), "-g", "bad.yaml", "-o", "run")
    )
    assert not marker.exists()


#: Where text becomes code: a job's own text, in the process that a server gives to it.
FAR_SIDE = {
    "persona_nnsight/backends/wire/session.py",
    "persona_nnsight/backends/wire/importing.py",
}


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What would unpickle, evaluate, or start a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names]
            yield from {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"} & set(names)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in ("eval", "exec", "os.system", "os.popen", "pd.read_pickle", "np.load"):
                yield name
            if name == "torch.load" and given.get("weights_only") != "True":
                yield "torch.load"
            if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield name
            if {"shell", "allow_pickle"} & given.keys():
                yield ast.unparse(node)


def test_the_source_has_none_of_it() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for top in ("persona_nnsight", "cli/persona_cli")
        for path in (ROOT / top).rglob("*.py")
        if list(forbidden(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == FAR_SIDE


# ------------------------------------------------------------------------------------- secrets


def assert_no_secret(*outcomes: Outcome) -> None:
    """Nothing that was printed or written here, hidden files too, holds a key."""
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert files
    said = [stream.encode() for outcome in outcomes for stream in (outcome.out, outcome.err)]
    for text in (*said, *(path.read_bytes() for path in files)):
        assert KEY.encode() not in text
        assert TOKEN.encode() not in text


def assert_key_was_sent(fake: FakeNdif) -> None:
    assert any(KEY in seen.headers.get("ndif-api-key", "") for seen in fake.seen)
    for seen in fake.seen:
        assert KEY not in seen.path
        assert TOKEN not in seen.path + " ".join(seen.headers.values())


#: What a server may say of a job that failed, with everything that it was sent.
BABBLE = f"Traceback (most recent call last):\n  File x\nValueError: headers {{'key': '{KEY}'}}"


@pytest.mark.parametrize("backend", ["local", "simulate"])
def test_a_run_here_holds_no_secret(
    backend: str, fake: FakeNdif, persona: Persona, tiny_dir: TinyDir
) -> None:
    run = persona(
        *("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "run"),
        *("--verbose", "--backend", backend),
    )
    assert run.code == 0, run.err
    assert_no_secret(run, persona("report", "run"), persona("jobs", "run", "-v"))
    # Where the command was typed, and with which environment, is nobody's business either.
    manifest = Path("run/run.json").read_text()
    assert str(Path.cwd()) not in manifest
    assert os.environ["PATH"] not in manifest


def test_a_run_there_holds_no_secret(fake: FakeNdif, persona: Persona, tiny_dir: TinyDir) -> None:
    there = ("--backend", "ndif", "--ndif-host", fake.url)
    run = persona("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "run", "-v", *there)
    assert run.code == 0, run.err
    assert_no_secret(run, persona("jobs", "run", "-v"), persona("report", "run"))
    assert_key_was_sent(fake)
    (job,) = fake.jobs
    blob = zstandard.ZstdDecompressor().decompressobj().decompress(job.blob)
    assert b"class _Shipped" in blob  # our text can be read in it, and so could a key be
    for secret in (KEY, TOKEN, os.environ["PATH"], str(Path.cwd()), str(Path.home())):
        assert secret.encode() not in blob


def test_a_failed_run_holds_no_secret(fake: FakeNdif, persona: Persona, tiny_dir: TinyDir) -> None:
    there = ("--backend", "ndif", "--ndif-host", fake.url)
    run = ("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "run", "-v", *there)
    fake.scripts = [(("ERROR", BABBLE),)]
    failed = persona(*run)
    assert failed.code == 2
    assert "ValueError: headers" in failed.err
    assert_no_secret(failed, persona("jobs", "run", "-v"), persona("jobs", "run", "--json"))
    shutil.rmtree("run", ignore_errors=True)
    fake.replies = {"/request": [Reply(401, {"detail": f"no such key: {KEY}"})]}
    assert_one_sentence(refused := persona(*run[:-5], *there))
    assert "no such key" in refused.err
    assert_no_secret(failed, refused)
    assert_key_was_sent(fake)


def test_a_detached_run_holds_no_secret(
    fake: FakeNdif, persona: Persona, tiny_dir: TinyDir
) -> None:
    fake.scripts = [(("QUEUED", f"for {KEY}"), ("QUEUED", f"for {KEY}"), *DONE)]
    there = ("--backend", "ndif", "--ndif-host", fake.url, "--detach")
    sent = persona("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "run", *there)
    assert sent.code == 0, sent.err
    assert Path("run/pending.json").exists()
    assert_no_secret(sent, persona("jobs", "run", "-v"))
    assert_no_secret(resumed := persona("resume", "run"))
    assert resumed.code == 0, resumed.err
    assert_key_was_sent(fake)


def test_doctor_names_no_secret(fake: FakeNdif, persona: Persona, tiny_dir: TinyDir) -> None:
    there = ("doctor", "-m", tiny_dir("llama"), "--backend", "ndif", "--ndif-host", fake.url)
    well = persona(*there)
    assert well.code == 0, well.out
    fake.replies = {
        "/env": [Reply(503, KEY.encode())],
        "/whoami": [Reply(401, {"detail": KEY})],
        "/status": [Reply(500, KEY.encode())],
    }
    assert_no_secret(well, persona(*there, "--json"))
    assert_key_was_sent(fake)


@pytest.mark.parametrize(
    "host",
    [
        f"https://someone:{KEY}@ndif.example.org",
        f"https://{KEY}@ndif.example.org",
        f"http://someone:{KEY}@127.0.0.1:9",
        f"https://ndif.example.org/?key={KEY}",
        f"https://ndif.example.org/#{KEY}",
        f"someone:{KEY}@ndif.example.org",
        f"https://someone:{KEY}@ndif.example.org:none",
        f"ftp://someone:{KEY}@ndif.example.org",
        f"https:/ndif.example.org?key={KEY}",
    ],
)
def test_a_secret_in_the_address_is_not_repeated(
    host: str, fake: FakeNdif, persona: Persona, tiny_dir: TinyDir
) -> None:
    there = ("--backend", "ndif", "--ndif-host", host)
    refused = persona("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "run", *there)
    assert_one_sentence(refused)
    looked = persona("doctor", "-m", tiny_dir("llama"), *there)
    assert_one_sentence(looked)
    assert not Path("run").exists()
    assert_no_secret(refused, looked)


@pytest.mark.parametrize("proxy", ["socks5://me:{}@127.0.0.1:9", "odd://me:{}@127.0.0.1:9"])
def test_a_secret_in_the_proxy_is_not_repeated(
    proxy: str, persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy.format(KEY))
    there = ("--backend", "ndif", "--ndif-host", "https://ndif.example.org")
    assert_one_sentence(refused := persona("doctor", "-m", tiny_dir("llama"), *there))
    assert "The proxy that the environment names" in refused.err
    assert_no_secret(refused)


CRASH = """
import sys
from persona_cli.app import main
from persona_nnsight.backends.ndif.server import Server
def submit(self, *arguments):
    key = self._key
    raise RuntimeError("boom")
Server.submit = submit
main(sys.argv[1:])
"""


def test_a_crash_shows_no_values(
    fake: FakeNdif, persona: Persona, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    """A real process, as what prints a traceback is the interpreter, or a hook of a library."""
    assert app.pretty_exceptions_enable is False
    arguments = ("substitute", "-m", tiny_dir("llama"), *SMALL, "-o", "run", "--verbose")
    there = ("--backend", "ndif", "--ndif-host", fake.url)
    done = subprocess.run(
        [sys.executable, "-c", CRASH, *map(str, (*arguments, *there))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: boom" in done.stderr
    assert_no_secret(Outcome(1, done.stdout, done.stderr))
    assert_key_was_sent(fake)
