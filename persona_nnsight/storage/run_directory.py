"""A run directory: what an experiment leaves on disk.

========================  ======================================================================
``run.json``              command, arguments, model, versions, grid, token ids, timings, memory
``kl.csv``                substitute, inject, steer: one row per cell and edit
``contrasts.csv``         the same: one row per edit and control, paired differences
``summary.csv``           one row per edit: over cells, with intervals
``text.jsonl``            with generated text: one object a line
``markers.csv``           with generated text and a grid with markers: one row per text
``geometry.csv``          one row per cell and site
``residuals.safetensors`` capture: h_BB, h_XB, h_BY, h_XY, float32 [cells, positions, layers, d];
                          its metadata holds the labels of the first three axes as JSON
``report.html``           written later by `persona_nnsight.report`, with ``figures/``
========================  ======================================================================

Until a run is finished the directory holds ``pending.json`` and ``parts/`` instead
(`persona_nnsight.storage.journal`).

The files are written under a temporary name and moved into place when all are done, ``run.json``
last: a directory that holds it holds a whole run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from persona_nnsight.errors import PersonaError
from persona_nnsight.storage.files import (
    PARTIAL,
    check_creatable,
    check_ours,
    clear_partial,
    is_plain,
    our_directory,
    remove,
    sync,
    workshop,
)
from persona_nnsight.storage.lock import LOCK

#: What a run leaves there until it is finished, besides its lock.
PENDING, PARTS = "pending.json", "parts"
#: What a run that is finished always has.
RUN = "run.json"
#: What to do about a directory that is not ours to write to.
ANOTHER_OUT = "choose another --out"

#: Directories that were made for their names, and those above them, by this process.
_reserved: list[Path] = []


def check_free(directory: Path) -> None:
    """Refuse a target that holds anything, before work is spent on it.

    Raises:
        PersonaError: `directory` is a file, holds a run, is not empty, is another user's, or cannot
            be made.
    """
    advice = "choose another --out, or remove it first"
    try:
        if directory.is_dir():
            if (directory / RUN).exists():
                raise PersonaError(f"{str(directory)!r} already holds a run; {advice}.")
            if (directory / PENDING).exists():
                raise PersonaError(
                    f"{str(directory)!r} holds a run that is not finished; go on with it by "
                    f"`persona resume {directory}`, or {advice}."
                )
            check_ours(directory, ANOTHER_OUT)
            if not all(map(_remains, directory.iterdir())):
                raise PersonaError(f"The directory {str(directory)!r} is not empty; {advice}.")
        elif directory.exists() or directory.is_symlink():
            raise PersonaError(f"{str(directory)!r} is a file, not a directory; {advice}.")
        check_creatable(directory, ANOTHER_OUT)
    except OSError as error:
        raise _unwritable(directory, error) from error


def _remains(path: Path) -> bool:
    """Whether a process that was killed may have left this: a lock, or an unfinished workshop."""
    if path.name == LOCK or path.name.startswith(f"{LOCK}-"):
        return is_plain(path)
    return path.name.startswith(PARTIAL) and path.is_dir() and not path.is_symlink()


def _unwritable(directory: Path, error: OSError, *, resumable: bool = False) -> PersonaError:
    way_out = f"make room and `persona resume {directory}`" if resumable else ANOTHER_OUT
    return PersonaError(
        f"The run cannot be written to {str(directory)!r} ({error.strerror or error}); {way_out}."
    )


def default_directory(name: str, root: Path = Path("outputs")) -> Path:
    """Make ``outputs/<name>-<n>`` with the lowest n that is free, which nobody else gets then.

    `release_unused` takes it back where nothing came of it.

    Raises:
        PersonaError: it cannot be made.
    """
    n, patience = 1, 10
    while True:
        directory = root / f"{name}-{n}"
        try:
            for above in (*reversed(root.parents), root):
                if not above.is_dir():
                    with suppress(FileExistsError):
                        _reserve(above)
            _reserve(directory)
        except FileExistsError:
            n += 1
        except OSError as error:
            # Another process may have taken `root` back, just after it was seen here.
            patience -= isinstance(error, FileNotFoundError)
            if not patience or not isinstance(error, FileNotFoundError):
                raise _unwritable(directory, error) from error
        else:
            return directory


def _reserve(directory: Path) -> None:
    directory.mkdir()
    _reserved.append(directory)


def release_unused() -> None:
    """Remove the directories that `default_directory` made and that hold nothing."""
    while _reserved:
        with suppress(OSError):  # it holds something
            _reserved.pop().rmdir()


def save_run(
    directory: Path, write_files: Callable[[Path], None], *, finishes: bool = False
) -> Path:
    """Make `directory` a run directory and return it.

    Args:
        directory: where the run goes.
        write_files: writes all files of the run into the directory it is given.
        finishes: the directory may hold the journal of this run, which then goes.

    Raises:
        PersonaError: the directory already holds something, or cannot be written.
    """
    pending = finishes and (directory / PENDING).exists()
    if not pending:
        check_free(directory)
    made = not directory.is_dir()
    moved: list[Path] = []
    try:
        our_directory(directory, ANOTHER_OUT)
        clear_partial(directory)  # of an attempt that was killed here
        with workshop(directory) as shop:
            write_files(shop)
            for path in shop.rglob("*"):
                sync(path)
            # run.json last: a directory that has it has everything.
            for name in sorted(os.listdir(shop), key=lambda name: name == RUN):
                moved.append(directory / name)
                if pending:
                    remove(directory / name)  # of an attempt that was stopped here
                os.replace(shop / name, directory / name)
            sync(directory)
    except BaseException as error:
        for path in moved:
            remove(path)
        if made:
            shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(directory, error, resumable=pending) from error
        raise
    clear_journal(directory)
    return directory


def clear_journal(directory: Path) -> None:
    """Remove what a finished run was gone on with; last ``pending.json``, which tells of it."""
    for path in (directory / LOCK, *directory.glob(f"{LOCK}-*"), directory / PARTS):
        remove(path)
    remove(directory / PENDING)
