"""What a model directory holds: which files are needed, which are missing, what they hash to.

A *model directory* is what `transformers` loads by path: `config.json`, tokenizer files, and the
weights as safetensors, either whole or as an index with the shards it lists. The same three
questions come up for a directory of the user's, for a snapshot in the hub cache and for a
repository that is still to be downloaded, so they are answered here once.

Weights in `pytorch_model.bin` are not taken: that is a pickle, which can hold more than numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

WHOLE_OR_INDEX = ("model.safetensors", "model.safetensors.index.json")
"""The names transformers looks for, in the order it tries them."""

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""The same as pickles, by which a repository without safetensors is known."""

ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
"""The names by which an adapter is known, beside the model that it changes or alone."""

#: Code (.py) is fetched with the rest, and runs only where `load_model` is told to trust it.
_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")


_WHOLE_FILE_LIMIT = 64 * 2**20
_BLOCKS, _BLOCK_BYTES = 64, 16 * 2**10


def missing(directory: Path, *, weights: bool) -> str | None:
    """Name the first thing `directory` lacks to be a model directory, or return None.

    >>> missing(Path("/nowhere"), weights=False)
    'config.json'
    """
    if not (directory / CONFIG).is_file():
        return CONFIG
    return _missing_weights(directory) if weights else None


def _missing_weights(directory: Path) -> str | None:
    """Name the weight file or shard that is missing; an index counts only with all its shards."""
    found = next((name for name in WHOLE_OR_INDEX if (directory / name).is_file()), None)
    if found is None:
        return "weights as safetensors (model.safetensors, whole or with an index)"
    if not found.endswith(".index.json"):
        return None
    try:
        shards = set(json.loads((directory / found).read_text("utf-8"))["weight_map"].values())
        # transformers would read a shard of another name as a pickle.
        readable = all(shard.endswith(".safetensors") for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        readable = False
    if not readable:
        return f"a readable {found}"
    absent = sorted(shard for shard in shards if not (directory / shard).is_file())
    return f"{absent[0]} ({len(absent)} of {len(shards)} shards)" if absent else None


def weight_files(directory: Path) -> list[Path]:
    """The files that the weights of a complete model directory are read from."""
    found = next(name for name in WHOLE_OR_INDEX if (directory / name).is_file())
    if not found.endswith(".index.json"):
        return [directory / found]
    index = json.loads((directory / found).read_text("utf-8"))
    return [directory / shard for shard in sorted(set(index["weight_map"].values()))]


def pickled(names: Iterable[str]) -> str | None:
    """Return the name of weights that are a pickle; None where there are none."""
    return _first_of(PICKLES, names)


def adapter(names: Iterable[str]) -> str | None:
    """Return the name of a file of an adapter; None where there is none."""
    return _first_of(ADAPTERS, names)


def _first_of(wanted: Iterable[str], names: Iterable[str]) -> str | None:
    there = set(names)
    return next((name for name in wanted if name in there), None)


def code_references(directory: Path) -> set[str]:
    """Name the classes that a checkpoint brings as code of its own, from its two `auto_map`s.

    They have the form `module.Class`, or `org/name--module.Class` in another repository.
    """
    found: set[str] = set()
    for name in (CONFIG, "tokenizer_config.json"):
        try:
            classes = json.loads((directory / name).read_text("utf-8"))["auto_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        for entry in classes:
            several = entry if isinstance(entry, list) else [entry]
            found.update(each for each in several if isinstance(each, str))
    return found


def unreadable(directory: Path) -> str | None:
    """Name the first configuration file that is there and is no JSON object, or return None.

    transformers passes over a damaged generation_config.json, and with it the end tokens.
    """
    for name in (CONFIG, GENERATION_CONFIG):
        try:
            if not isinstance(json.loads((directory / name).read_text("utf-8")), dict):
                return name
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError):
            return name
    return None


def settings_of(directory: Path, name: str) -> dict[str, Any]:
    """What a configuration file that is no damaged one says (`unreadable`); nothing without it."""
    try:
        found: dict[str, Any] = json.loads((directory / name).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return found


def has_vocabulary(directory: Path) -> bool:
    """Tell whether `directory` holds a tokenizer's vocabulary in any of the usual forms."""
    return any(path.is_file() for name in _VOCABULARIES for path in directory.glob(name))


def wanted(names: Iterable[str], *, weights: bool) -> list[str]:
    """Choose the files of a repository to download: config, tokenizer, and one set of weights.

    Only the top level counts, and copies of the weights in other forms and layouts
    (`pytorch_model.bin`, `consolidated.safetensors`, `onnx/…`) are left out.

    >>> wanted(["config.json", "model.safetensors", "pytorch_model.bin", "README.md"], weights=True)
    ['config.json', 'model.safetensors']
    """
    top = sorted(name for name in names if "/" not in name)
    found = next((name for name in WHOLE_OR_INDEX if name in top), None)
    chosen = [
        name for name in top if name.endswith(_SMALL_SUFFIXES) and not name.endswith(".index.json")
    ]
    if weights and found:
        whole = not found.endswith(".index.json")
        chosen += [
            name
            for name in top
            if name == found
            or (not whole and name.startswith("model") and name.endswith(".safetensors"))
        ]
    return chosen


def fingerprint(directory: Path) -> str:
    """Hash what makes `directory` this model, in well under a second whatever its size.

    SHA-256 over one line `name␀size␀digest` per file at the top level of the directory, by name,
    for the suffixes .json .jinja .model .txt .tiktoken .py .safetensors. `digest` is the SHA-256
    of the whole file up to 64 MiB; of a larger file, of 64 blocks of 16 KiB spread evenly from its
    first byte (a safetensors header) to its last. Two checkpoints of one architecture therefore
    differ, although a few changed bytes in gigabytes of weights may go unseen.
    """
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (*_SMALL_SUFFIXES, ".safetensors") and path.is_file():
            size = path.stat().st_size
            total.update(f"{path.name}\0{size}\0{_content_digest(path, size)}\n".encode())
    return total.hexdigest()


def _content_digest(path: Path, size: int) -> str:
    """Hash a whole file, or evenly spread blocks of a large one."""
    if size <= max(_WHOLE_FILE_LIMIT, _BLOCK_BYTES):
        return file_sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in range(_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file of any size without holding it in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def slug(name: str) -> str:
    """Turn a model's name into a short, lower-case, file-name-safe one.

    >>> slug("google/gemma-2-2b-it"), slug("My Model (v2).gguf")
    ('gemma-2-2b-it', 'my-model-v2')
    """
    last = PurePosixPath(name.replace("\\", "/")).name.lower().removesuffix(".gguf")
    safe = "".join(
        char if (char.isascii() and char.isalnum()) or char in "._-" else " " for char in last
    )
    return "-".join(safe.split()).strip(".-") or "model"


def human_size(size: int) -> str:
    """Write a number of bytes for people, in powers of ten.

    >>> human_size(98362432)
    '98 MB'
    """
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return (
                f"{size / scale:.1f} {unit}" if size < 10 * scale else f"{size / scale:.0f} {unit}"
            )
    return f"{size} B"
