"""A hub id -> its snapshot on this machine: the local cache first, then one question, then files.

Without a network the hub's own client retries for minutes. Here the cache is asked first, without
any request; what it lacks is asked for in one metadata request with a deadline of a few seconds,
which also tells a wrong id from a gated model from a dead network; and only then files are
downloaded, by the hub's client and into the hub's cache, so they are shared with other programs.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from persona_nnsight.errors import PersonaError, first_line
from persona_nnsight.models.weights.embedded import ALIAS
from persona_nnsight.models.weights.model_files import (
    CONFIG,
    adapter,
    file_sha256,
    has_vocabulary,
    human_size,
    missing,
    pickled,
    wanted,
)
from persona_nnsight.models.weights.unread import MERGE

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

T = TypeVar("T")

DEADLINE = 4.0
"""Seconds the one metadata request may take, name resolution included."""

INSTEAD = f"a model directory, a .gguf file or the embedded {ALIAS!r}"
"""What works without a hub, for error messages."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


def is_id(spec: str) -> bool:
    """Tell whether `spec` has the form of a hub id, `org/name`.

    >>> is_id("google/gemma-2-2b-it"), is_id("gemma-2-2b-it"), is_id("google/gemma 2")
    (True, False, False)
    """
    forbidden = ".." in spec or "--" in spec or spec.endswith(".git")
    return bool(_ID.fullmatch(spec)) and len(spec) <= 96 and not forbidden


def cache() -> Path:
    """Return the hub's own cache directory (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def cached_ids() -> list[str]:
    """Return the ids of models of which the hub cache holds anything."""
    folders = sorted(cache().glob("models--*--*"))
    return ["/".join(folder.name.split("--")[1:]) for folder in folders]


def snapshot_of(path: Path) -> str | None:
    """Return the id of the model that a directory is a snapshot of in a hub cache, or None.

    >>> commit = "0123456789abcdef0123456789abcdef01234567"
    >>> snapshot_of(Path("hub/models--google--gemma-2-2b-it/snapshots") / commit)
    'google/gemma-2-2b-it'
    """
    kind, *names = path.parent.parent.name.split("--")
    if path.parent.name != "snapshots" or kind != "models" or not _COMMIT.fullmatch(path.name):
        return None
    return "/".join(names) or None


def is_complete(snapshot: Path, *, weights: bool) -> bool:
    """Tell whether a snapshot holds config, vocabulary and, if asked for, all weights."""
    return missing(snapshot, weights=weights) is None and has_vocabulary(snapshot)


def snapshot(
    model_id: str,
    *,
    revision: str | None,
    fetch: bool,
    weights: bool,
    notify: Callable[[str], None],
) -> Path:
    """Return the snapshot directory of `model_id`, downloading what is missing.

    A branch that is in the cache is used as it is there, even if it has moved on the hub since.
    """
    found = cached(model_id, revision, weights=weights)
    if found:
        return found
    named = f"{model_id!r}" + (f" at revision {revision!r}" if revision else "")
    if not fetch:
        option = f" --revision {revision}" if revision else ""
        raise PersonaError(
            f"The model {named} is not in the local hub cache, or not completely; "
            f"run `persona models pull {model_id}{option}`."
        )
    if _offline():
        raise PersonaError(
            f"The model {named} is not in the local hub cache, or not completely, and "
            f"HF_HUB_OFFLINE forbids to download it; unset that, or use {INSTEAD}."
        )
    notify(f"looking up {model_id} on the hub")
    info = _ask(model_id, revision)
    files = _choose(info, model_id, weights=weights)
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or []}
    notify(f"downloading {model_id} ({human_size(sum(sizes[name] for name in files))})")
    found = _download(model_id, revision, files)
    _verify(found, info, files)
    if not is_complete(found, weights=weights):
        lacking = missing(found, weights=weights) or "a tokenizer's vocabulary"
        raise PersonaError(
            f"The hub's {model_id!r} lacks {lacking}; choose a model that is published for "
            "transformers, with its tokenizer."
        )
    return found


def cached(model_id: str, revision: str | None, *, weights: bool) -> Path | None:
    """Return the snapshot in the local cache if everything needed is in it; ask nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache(),
            local_files_only=True,
            allow_patterns=[CONFIG],
        )
    except (LocalEntryNotFoundError, OSError):
        return None
    return Path(path) if is_complete(Path(path), weights=weights) else None


def _offline() -> bool:
    """Tell whether the hub's offline mode is on, in the environment now or when it was imported."""
    from huggingface_hub import constants

    values = (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
    on = any((value or "").upper() in {"1", "ON", "YES", "TRUE"} for value in values)
    return on or bool(constants.HF_HUB_OFFLINE)


def _ask(model_id: str, revision: str | None) -> ModelInfo:
    """Ask the hub about a model once, without retries; every failure is one sentence."""
    from huggingface_hub import HfApi, errors

    def ask() -> ModelInfo:
        # Its own timeout is the longer one, so that one alone of the two speaks.
        return HfApi().model_info(
            model_id, revision=revision, timeout=2 * DEADLINE, files_metadata=True
        )

    try:
        return _within(DEADLINE, ask)
    except concurrent.futures.TimeoutError as error:
        raise _unreachable(model_id, f"no answer in {DEADLINE:g} s") from error
    except errors.HfHubHTTPError as error:
        raise _refused(model_id, revision, error) from error
    except Exception as error:  # connection, name resolution, proxy, TLS, a page that is no JSON
        raise _unreachable(model_id, first_line(error)) from error


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Run `work` for at most `seconds`; a name resolver that hangs heeds no other timeout.

    The thread is a daemon, not of a pool: a pool would wait for it when the program ends.
    """
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(timeout=seconds)


def _choose(info: ModelInfo, model_id: str, *, weights: bool) -> list[str]:
    """Choose the files to download, refusing what could not be loaded afterwards."""
    from huggingface_hub import get_token

    if info.gated and not get_token():
        raise _gated(model_id)
    names = [item.rfilename for item in info.siblings or []]
    if lone := adapter(names):
        raise PersonaError(
            f"The hub's {model_id!r} holds an adapter ({lone}), which would not be applied; "
            f"{MERGE}, and give the directory of the merged model."
        )
    files = wanted(names, weights=weights)
    lacking = [] if CONFIG in files else [CONFIG]
    if weights and not any(name.endswith(".safetensors") for name in files):
        lacking.append("weights as safetensors")
    if lacking:
        hint = "choose a model that is published for transformers"
        if any(name.endswith(".gguf") for name in names):
            hint = "download one of its .gguf files and give the path of that"
        elif pickle := pickled(names):
            hint = f"{pickle} is a pickle, which is never loaded; {hint} as safetensors"
        raise PersonaError(f"The hub's {model_id!r} holds no {' and no '.join(lacking)}; {hint}.")
    return files


def _download(model_id: str, revision: str | None, files: list[str]) -> Path:
    """Download `files` into the hub cache; files that are there already are not fetched again."""
    import httpx
    from huggingface_hub import errors, snapshot_download

    try:
        path = snapshot_download(
            model_id, revision=revision, cache_dir=cache(), allow_patterns=files
        )
    except errors.HfHubHTTPError as error:
        raise _refused(model_id, revision, error) from error
    except (OSError, httpx.HTTPError) as error:
        raise PersonaError(
            f"The download of {model_id!r} broke off ({first_line(error)}); "
            "run the same command again, files that are complete are kept."
        ) from error
    return Path(path)


def _verify(found: Path, info: ModelInfo, files: list[str]) -> None:
    """Compare large files with the SHA-256 in the hub's metadata, and keep none that differs.

    The hub's client itself compares their size alone. Small files, which are in git, have no hash.
    """
    for item in info.siblings or []:
        path = found / item.rfilename
        if item.rfilename in files and item.lfs and file_sha256(path) != item.lfs.sha256:
            # The snapshot only links to the content; a link to elsewhere is no content of ours.
            if (content := path.resolve()).is_relative_to(found.parents[1].resolve()):
                content.unlink()
            path.unlink(missing_ok=True)
            raise PersonaError(
                f"The file {item.rfilename} of {info.id!r} is not what the hub announced (SHA-256 "
                f"expected {item.lfs.sha256}), so it was not kept; run the same command again."
            )


def _refused(model_id: str, revision: str | None, error: Exception) -> PersonaError:
    """Say what an error answer of the hub means for the user."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _gated(model_id)
    if isinstance(error, errors.RevisionNotFoundError):
        return PersonaError(
            f"The model {model_id!r} has no revision {revision!r} on the hub; "
            "give a branch, a tag or a full commit hash, or leave it out."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return PersonaError(
            f"The hub has no model {model_id!r}, or it is private; check the id "
            "(org/name, as on the model page), or set HF_TOKEN to a token that may read it."
        )
    status = getattr(getattr(error, "response", None), "status_code", "an error")
    return PersonaError(
        f"The hub answered {status} when asked for {model_id!r}; try again later, "
        f"check HF_TOKEN if it is set, or use {INSTEAD}."
    )


def _gated(model_id: str) -> PersonaError:
    """Say what opens a gated model."""
    return PersonaError(
        f"The model {model_id!r} is gated; accept its licence on the model page, then set "
        "HF_TOKEN to an access token of the account that did."
    )


def _unreachable(model_id: str, reason: str) -> PersonaError:
    """Say that there is no network, and what works without one."""
    return PersonaError(
        f"The model {model_id!r} is not in the local hub cache and the hub cannot be reached "
        f"({reason}); check the network, or use {INSTEAD}."
    )
