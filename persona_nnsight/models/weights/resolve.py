"""From a model spec to a directory of weights on this machine.

A *spec* is what a user types after `--model`: the alias of the embedded model, the path of a
GGUF file, the path of a model directory, or a hub id. Whatever it is, `resolve` returns the
directory that transformers and nnsight load, with enough about its origin to name a run after it
and to tell later whether it was the same model.

>>> resolve("smollm2-135m").path                                    # doctest: +SKIP
'…/persona-nnsight/models/smollm2-135m-b179c9523d0e'

Nothing here imports torch or transformers, so that `persona --help` stays fast.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from persona_nnsight.errors import PersonaError
from persona_nnsight.models.weights import embedded, gguf_convert, hub, model_files, unread

ALIASES = (embedded.ALIAS,)
"""Names that stand for a model without being an id or a path."""

FORMS = (
    f"the alias {embedded.ALIAS!r}, a hub id (org/name), a model directory or the path of a .gguf"
)
"""What a spec may be, for error messages and help texts."""


@dataclass(frozen=True)
class Weights:
    """A model that is on this machine, ready to load.

    Attributes:
        spec: What the user typed.
        path: A directory transformers loads; for a hub id, its snapshot directory.
        model_id: The hub id, the alias, or the name of the directory or GGUF file.
        slug: A short name, safe in file names: `smollm2-135m`, `gemma-2-2b-it`.
        revision: The commit hash of a hub snapshot; else None.
        asked_revision: The branch, tag or commit that was asked for; else None.
        sha256: Of a GGUF file (the embedded one too), the hash of the file; of a directory, its
            fingerprint (`model_files.fingerprint`: whole small files, blocks spread over large
            ones); of a hub snapshot None, as the revision says it all.
    """

    spec: str
    path: str
    model_id: str
    slug: str
    revision: str | None = None
    asked_revision: str | None = None
    sha256: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the model is only on this machine, not on the hub."""
        return self.revision is None


@dataclass(frozen=True)
class ModelEntry:
    """One line of `persona models`."""

    id: str
    kind: Literal["embedded", "gguf", "hub"]
    state: Literal["ready", "not fetched"]
    path: Path | None
    bytes: int


def cache_dir() -> Path:
    """Return where converted models are kept: PERSONA_CACHE, or this system's usual place."""
    chosen = os.environ.get("PERSONA_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("persona-nnsight")


def _models_dir() -> Path:
    return cache_dir() / "models"


def resolve(
    spec: str,
    *,
    revision: str | None = None,
    fetch: bool = True,
    weights: bool = True,
    needs_template: bool = False,
    notify: Callable[[str], None] | None = None,
) -> Weights:
    """Find the model `spec` names, fetching or converting it if need be.

    Args:
        spec: An alias, a GGUF file, a model directory or a hub id.
        revision: Branch, tag or commit; for hub ids only.
        fetch: Whether weights may be downloaded, or converted, for this.
        weights: False asks for config and tokenizer only, as a dry run does; it spares the
            download of a hub model's weights, and a directory needs none.
        needs_template: Whether a GGUF file without a chat template is refused rather than
            converted.
        notify: Called with one line at the start of each slow step.
    """
    tell = notify or (lambda _: None)
    spec = spec.strip()
    if "\0" in spec:  # which no system call takes
        raise PersonaError(f"No such file or directory: {spec!r}; a model is {FORMS}.")
    path = Path(os.path.expanduser(spec))
    if spec not in ALIASES and not _is_path(spec, path):
        return _from_hub(spec, revision, fetch=fetch, weights=weights, notify=tell)
    if revision is not None:
        raise PersonaError(
            f"A revision ({revision!r}) can be chosen for a hub id only, "
            f"and {spec!r} is none; leave it out."
        )
    if spec in ALIASES:
        return _from_embedded(spec, fetch=fetch, notify=tell)
    with _readable(spec):
        is_directory, is_file = path.is_dir(), path.is_file()
    if is_directory:
        with _readable(spec):
            return _from_directory(spec, path, weights=weights)
    if is_file:
        return _from_gguf(spec, path, fetch=fetch, needs_template=needs_template, notify=tell)
    raise PersonaError(f"No such file or directory: {spec!r}; a model is {FORMS}.")


def _is_path(spec: str, path: Path) -> bool:
    """Tell whether `spec` exists as a path, or could not be meant as anything else."""
    looks = spec.startswith((".", "~", "/")) or spec.endswith((".gguf", "/", os.sep))
    nested = spec.count("/") > 1 or (os.sep != "/" and os.sep in spec)
    try:
        return bool(spec) and (looks or nested or path.exists())
    except OSError:  # a name that is too long to be one
        return False


def _from_embedded(spec: str, *, fetch: bool, notify: Callable[[str], None]) -> Weights:
    """Resolve the alias of the embedded model."""
    path = embedded.ensure(_models_dir(), fetch=fetch, notify=notify)
    return Weights(spec, str(path), spec, model_files.slug(spec), sha256=embedded.GGUF_SHA256)


def _from_gguf(
    spec: str, path: Path, *, fetch: bool, needs_template: bool, notify: Callable[[str], None]
) -> Weights:
    """Resolve a GGUF file, converting it the first time its content is met."""
    with _readable(spec):
        with path.open("rb") as file:
            magic = file.read(4)
        digest = model_files.file_sha256(path) if magic == gguf_convert.MAGIC else ""
    if magic != gguf_convert.MAGIC:
        kind = "no GGUF file (it does not start with the letters GGUF)"
        raise PersonaError(f"{spec!r} is a file but {kind}; a model is {FORMS}.")
    record = {"id": path.name, "source": path.name, "gguf_sha256": digest}
    target = _models_dir() / f"gguf-{digest[:12]}"
    if not fetch and not gguf_convert.is_converted(target):
        raise PersonaError(
            f"{spec!r} has not been converted on this machine; run `persona models pull {spec}`."
        )
    gguf_convert.convert(path, target, record=record, needs_template=needs_template, notify=notify)
    return Weights(spec, str(target), path.name, model_files.slug(path.name), sha256=digest)


@contextmanager
def _readable(spec: str) -> Iterator[None]:
    """Say in one sentence that files of the user's cannot be read."""
    try:
        yield
    except OSError as error:
        raise PersonaError(
            f"The files of {spec!r} cannot be read ({error.strerror or error}); check that they "
            "are yours to read, and the disk they are on."
        ) from error


def _from_directory(spec: str, path: Path, *, weights: bool) -> Weights:
    """Resolve a directory of the user's, if it is one of a model."""
    path = path.resolve()
    unread.refuse_adapter(path, spec)
    if lacking := model_files.missing(path, weights=weights):
        hint = (
            "a model directory holds config.json, tokenizer files and *.safetensors, "
            "as `save_pretrained` writes them"
        )
        if ggufs := sorted(path.glob("*.gguf")):
            hint = f"give the path of {ggufs[0].name} in it instead"
        elif pickle := model_files.pickled(file.name for file in path.iterdir()):
            hint = f"{pickle} is a pickle, which is never loaded; {hint}"
        raise PersonaError(f"{spec!r} is no model directory, it lacks {lacking}; {hint}.")
    _refuse_unreadable(path, spec)
    unread.refuse_other_weights(path, spec)
    if (model_id := hub.snapshot_of(path)) is not None:
        return _snapshot(spec, path, model_id, asked_revision=path.name)
    digest = model_files.fingerprint(path)
    return Weights(spec, str(path), path.name, model_files.slug(path.name), sha256=digest)


def _refuse_unreadable(path: Path, spec: str) -> None:
    if damaged := model_files.unreadable(path):
        raise PersonaError(
            f"The {damaged} of {spec!r} is no JSON object, so it is damaged or not saved as UTF-8; "
            "fetch or copy the model again."
        )


def _from_hub(
    spec: str,
    revision: str | None,
    *,
    fetch: bool,
    weights: bool,
    notify: Callable[[str], None],
) -> Weights:
    """Resolve what can only be a hub id."""
    if not hub.is_id(spec):
        raise PersonaError(f"{spec!r} is no model; {_suggestion(spec)}a model is {FORMS}.")
    path = hub.snapshot(
        spec, revision=revision, fetch=fetch or not weights, weights=weights, notify=notify
    )
    unread.refuse_adapter(path, spec)
    _refuse_unreadable(path, spec)
    unread.refuse_other_weights(path, spec)
    return _snapshot(spec, path, spec, asked_revision=revision)


def _snapshot(spec: str, path: Path, model_id: str, *, asked_revision: str | None) -> Weights:
    """A snapshot in the hub cache, which is called by the commit that it is of."""
    return Weights(
        spec,
        str(path),
        model_id,
        model_files.slug(model_id),
        revision=path.name,
        asked_revision=asked_revision,
    )


def _suggestion(spec: str) -> str:
    """Return "did you mean …? " for a name close to an alias or to a model in the hub cache."""
    known = {alias: alias for alias in ALIASES}
    for model_id in hub.cached_ids():
        known.setdefault(model_id.lower(), model_id)
        known.setdefault(model_files.slug(model_id), model_id)
    close = difflib.get_close_matches(spec.lower(), known, n=2, cutoff=0.5)
    meant = dict.fromkeys(known[name] for name in close)
    return f"did you mean {' or '.join(map(repr, meant))}? " if meant else ""


def list_models() -> list[ModelEntry]:
    """List the models this machine has, the embedded one first whether it is there or not."""
    return [_embedded_entry(), *_gguf_entries(), *_hub_entries()]


def _embedded_entry() -> ModelEntry:
    path = embedded.directory(_models_dir())
    if not embedded.is_ready(_models_dir()):
        return ModelEntry(embedded.ALIAS, "embedded", "not fetched", None, 0)
    return ModelEntry(embedded.ALIAS, "embedded", "ready", path, _directory_bytes(path))


def _gguf_entries() -> list[ModelEntry]:
    found = ((path, gguf_convert.read_marker(path)) for path in _models_dir().glob("gguf-*"))
    entries = [
        ModelEntry(str(marker["id"]), "gguf", "ready", path, _directory_bytes(path))
        for path, marker in found
        if marker
    ]
    return sorted(entries, key=lambda entry: entry.id)


def _hub_entries() -> list[ModelEntry]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(hub.cache()).repos
    except (CacheNotFound, ValueError):
        return []
    entries = []
    for repo in repos:
        if repo.repo_type == "model":
            complete = any(
                hub.is_complete(found.snapshot_path, weights=True) for found in repo.revisions
            )
            state: Literal["ready", "not fetched"] = "ready" if complete else "not fetched"
            entry = ModelEntry(repo.repo_id, "hub", state, repo.repo_path, repo.size_on_disk)
            entries.append(entry)
    return sorted(entries, key=lambda entry: entry.id)


def _directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
