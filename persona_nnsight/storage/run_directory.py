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
import tempfile
from collections.abc import Callable
from pathlib import Path

from persona_nnsight.errors import PersonaError
from persona_nnsight.storage.files import check_creatable, remove, sync

#: What a run leaves there until it is finished.
PENDING, PARTS, LOCK = "pending.json", "parts", ".lock"
#: What a run that is finished always has.
RUN = "run.json"
#: What a process that is killed may leave, besides: files under their temporary names.
_PARTIAL = ".partial-"
_REMAINS = (LOCK, f".{PENDING}.partial")


def check_free(directory: Path) -> None:
    """Refuse a target that holds anything, before work is spent on it.

    Raises:
        PersonaError: `directory` is a file, holds a run, is not empty, or cannot be made.
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
            if any(path.name not in _REMAINS for path in directory.iterdir()):
                raise PersonaError(f"The directory {str(directory)!r} is not empty; {advice}.")
        elif directory.exists() or directory.is_symlink():
            raise PersonaError(f"{str(directory)!r} is a file, not a directory; {advice}.")
        check_creatable(directory, "choose another --out")
    except OSError as error:
        raise _unwritable(directory, error) from error


def _unwritable(directory: Path, error: OSError, *, resumable: bool = False) -> PersonaError:
    way_out = f"make room and `persona resume {directory}`" if resumable else "choose another --out"
    return PersonaError(
        f"The run cannot be written to {str(directory)!r} ({error.strerror or error}); {way_out}."
    )


def default_directory(name: str, root: Path = Path("outputs")) -> Path:
    """``outputs/<name>-<n>`` with the lowest n that is free."""
    n = 1
    while (directory := root / f"{name}-{n}").exists():
        n += 1
    return directory


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
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob(f"{_PARTIAL}*"):
            remove(path)  # of an attempt that was killed here
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=directory) as partial:
            write_files(Path(partial))
            for path in Path(partial).rglob("*"):
                sync(path)
            # run.json last: a directory that has it has everything.
            for name in sorted(os.listdir(partial), key=lambda name: name == RUN):
                moved.append(directory / name)
                if pending:
                    remove(directory / name)  # of an attempt that was stopped here
                os.replace(Path(partial, name), directory / name)
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
    for name in (LOCK, PARTS, PENDING):
        remove(directory / name)
