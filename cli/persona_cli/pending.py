"""The backend of a command, and runs whose jobs are with a server."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from persona_cli.command_line import typed
from persona_cli.console import notes
from persona_cli.options import BackendOptions, ModelOptions
from persona_nnsight.errors import PersonaError
from persona_nnsight.runs import PENDING, check_free

if TYPE_CHECKING:
    from persona_nnsight.backends import Backend
    from persona_nnsight.backends.ledger import Ledger
    from persona_nnsight.grids import Grid
    from persona_nnsight.models import Model
    from persona_nnsight.plan import Plan


def check_target(directory: Path, where: BackendOptions) -> None:
    """Refuse a directory that holds something else than the run to go on with.

    Raises:
        PersonaError: see `persona_nnsight.runs.check_free`.
    """
    if where.resume is None:
        check_free(directory)


def check_model_options(model: ModelOptions, where: BackendOptions) -> None:
    """Refuse what a server decides, and what is no memory budget.

    Raises:
        PersonaError: a device for a server, or a bad memory budget.
    """
    where.memory_bytes()
    if where.name == "ndif" and model.device != "auto":
        raise PersonaError(
            f"--device {model.device} is for this machine, and with --backend ndif the server "
            "decides; leave it out."
        )


def make_backend(
    model: Model,
    where: BackendOptions,
    dtype: str,
    out: Path | None = None,
    studies: Iterable[tuple[Grid, Plan]] = (),
    notify: Callable[[str], None] | None = None,
) -> Backend:
    """The backend that the options name.

    Args:
        model: with its weights, or for a server or a dry run without.
        where: the options.
        dtype: as given on the command line.
        out: the run directory, where jobs are recorded; None for a dry run.
        studies: what is going to be computed, to be compared with what a directory holds.
        notify: told how the jobs are.

    Raises:
        PersonaError: a bad host, or a run that is not the one the directory holds.
    """
    if where.name == "local":
        from persona_nnsight.backends.local import LocalBackend

        return LocalBackend(model, memory_budget=where.memory_bytes())
    if where.name == "simulate":
        from persona_nnsight.backends.simulate import SimulatedBackend

        return SimulatedBackend(model)
    from persona_nnsight.backends.ndif import NdifBackend
    from persona_nnsight.backends.server import Server

    server = Server(where.ndif_host, insecure=where.insecure)
    ledger = None if out is None else _ledger(out, where, _subject(model, dtype, studies))
    return NdifBackend(
        model,
        server,
        dtype=None if dtype == "auto" else dtype,
        ledger=ledger,
        detach=where.detach,
        notify=notify,
    )


def _ledger(out: Path, where: BackendOptions, subject: Mapping[str, str]) -> Ledger:
    from persona_nnsight.backends.ledger import Ledger, Origin

    if where.resume is None:
        return Ledger(out, Origin(typed.get(), os.getcwd(), subject))
    ledger = Ledger.load(out)
    before = {} if ledger.origin is None else dict(ledger.origin.subject)
    changed = [
        f"{name} was {before.get(name, 'not there')}, is {subject.get(name, 'not there')}"
        for name in {**before, **subject}
        if before.get(name) != subject.get(name)
    ]
    if changed:
        raise PersonaError(
            f"The run in {str(out)!r} cannot be gone on with, because it would not be the same run "
            f"({'; '.join(changed)}); restore what was there, or start anew in another directory."
        )
    return ledger


def _subject(model: Model, dtype: str, studies: Iterable[tuple[Grid, Plan]]) -> dict[str, str]:
    """What a run computes, in words and digests that can be compared."""
    from persona_nnsight.plan_data import to_data

    weights = model.weights
    subject = {
        "persona-nnsight": version("persona-nnsight"),
        "model": f"{weights.model_id} {(weights.sha256 or weights.revision or '')[:12]}",
        "attention": model.attention,
        "dtype": dtype,
    }
    for number, (grid, plan) in enumerate(studies, start=1):
        subject[f"grid {number}"] = f"{grid.name} {_digest(grid.to_dict())}"
        subject[f"plan {number}"] = f"{plan.command} {_digest(to_data(plan))}"
    return subject


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def note_pending(directory: Path, *, as_json: bool, interrupted: bool = False) -> NoReturn:
    """Say that a run's jobs go on without this process, and leave.

    Job ids go to standard output, so that a script can keep them.
    """
    from persona_nnsight.backends.ledger import Ledger

    ids = [job.id for job in Ledger.load(directory).jobs.values() if job.id is not None]
    if as_json:
        print(json.dumps({"complete": False, "out": str(directory), "jobs": ids}, indent=1))
    else:
        print("\n".join(ids))
    what = "Interrupted; the jobs that were sent go on." if interrupted else "The jobs are sent."
    advice = f"`persona jobs {directory}` shows them, `persona resume {directory}` collects them."
    notes.print(f"{what} {advice}", markup=False, soft_wrap=True)
    raise typer.Exit(130 if interrupted else 0)


def is_pending(directory: Path) -> bool:
    """Whether a directory holds jobs to be collected."""
    return (directory / PENDING).exists()
