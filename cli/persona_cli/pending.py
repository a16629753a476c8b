"""The backend of a command, and runs that are not finished."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from persona_cli.command_line import typed
from persona_cli.console import note, say, show_json
from persona_cli.options import BackendOptions, ModelOptions
from persona_nnsight.errors import PersonaError
from persona_nnsight.storage.run_directory import PENDING, check_free

if TYPE_CHECKING:
    from persona_nnsight.backends.interface import Backend
    from persona_nnsight.experiments.execution import Study
    from persona_nnsight.models.loading import Model
    from persona_nnsight.storage.journal import Journal


def check_target(directory: Path, where: BackendOptions) -> None:
    """Refuse a directory that holds something else than the run to go on with.

    Raises:
        PersonaError: see `persona_nnsight.storage.run_directory.check_free`.
    """
    if where.resume is None:
        check_free(directory)


def check_model_options(model: ModelOptions, where: BackendOptions) -> None:
    """Refuse what a server decides, and what is no memory budget.

    Raises:
        PersonaError: a device or trust in code for a server, or a bad memory budget.
    """
    where.memory_bytes()
    if where.name == "ndif" and model.device != "auto":
        raise PersonaError(
            f"--device {model.device} is for this machine, and with --backend ndif the server "
            "decides; leave it out."
        )
    if where.name == "ndif" and model.trust_remote_code:
        raise PersonaError(
            "--trust-remote-code is for this machine, and with --backend ndif the server decides "
            "whose code it runs; leave it out."
        )


def make_backend(
    model: Model,
    where: BackendOptions,
    dtype: str,
    out: Path | None = None,
    studies: Sequence[Study[Any]] = (),
    notify: Callable[[str], None] | None = None,
) -> Backend:
    """The backend that the options name.

    Args:
        model: with its weights, or for a server or a dry run without.
        where: the options.
        dtype: as given on the command line.
        out: the run directory, where what is finished is kept; None for a dry run.
        studies: what is going to be computed, to be compared with what a directory holds.
        notify: told how the jobs are.

    Raises:
        PersonaError: a bad host, or a run that is not the one the directory holds.
    """
    if where.name == "local":
        from persona_nnsight.backends.local import LOCAL, LocalBackend

        subject = {
            **_subject(model, str(model.dtype).removeprefix("torch."), studies),
            "device": model.device,
            **{name: version(name) for name in ("torch", "transformers", "nnsight")},
        }
        return LocalBackend(
            model,
            memory_budget=where.memory_bytes(),
            journal=None if out is None else _journal(out, LOCAL, where, subject),
        )
    if where.name == "simulate":
        from persona_nnsight.backends.simulate import SimulatedBackend

        return SimulatedBackend(model)
    from persona_nnsight.backends.ndif.backend import NdifBackend
    from persona_nnsight.backends.ndif.ledger import BACKEND, Ledger
    from persona_nnsight.backends.ndif.server import Server

    server = Server(where.ndif_host, insecure=where.insecure)
    ledger = None
    if out is not None:
        ledger = Ledger.of(_journal(out, BACKEND, where, _subject(model, dtype, studies)))
    return NdifBackend(
        model,
        server,
        dtype=None if dtype == "auto" else dtype,
        ledger=ledger,
        detach=where.detach,
        notify=notify,
    )


def _journal(out: Path, backend: str, where: BackendOptions, subject: Mapping[str, Any]) -> Journal:
    from persona_nnsight.storage.journal import Journal, Origin

    if where.resume is None:
        return Journal(out, backend, Origin(typed.get(), os.getcwd(), subject), notify=note)
    journal = Journal.load(out)
    journal.notify = note
    before = {} if journal.origin is None else journal.origin.subject
    if changed := list(_differences(before, json.loads(json.dumps(subject)))):
        more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise PersonaError(
            f"The run in {str(out)!r} cannot be gone on with, because it would not be the same run "
            f"({'; '.join(changed[:_SHOWN])}{more}); restore what was there, or start anew in "
            "another directory."
        )
    return journal


#: How many differences are named, and how much of a value.
_SHOWN = 3
_LONGEST = 60


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where JSON-like data is not the same: ``grid 1 personas chef was 'a', is 'b'``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name} {key}".lstrip())
    elif before != now:
        was, is_now = (
            "not there" if value is None else repr(value)[:_LONGEST] for value in (before, now)
        )
        yield f"{name} was {was}, is {is_now}"


def _subject(model: Model, dtype: str, studies: Sequence[Study[Any]]) -> dict[str, Any]:
    """What a run computes, as data that can be compared.

    The plan comes last: where a grid differs, its prompts do too.
    """
    from persona_nnsight.plan.data import digest
    from persona_nnsight.storage.manifest import rendering_record

    weights = model.weights
    return {
        "persona-nnsight": version("persona-nnsight"),
        "model": f"{weights.model_id} {(weights.sha256 or weights.revision or '')[:12]}",
        "attention": model.attention,
        "dtype": dtype,
        **{name: value for each in studies for name, value in rendering_record(each.plan).items()},
        **{f"grid {number}": each.grid.to_dict() for number, each in enumerate(studies, start=1)},
        **{
            f"plan {number}": f"{each.plan.command} {digest(each.plan)}"
            for number, each in enumerate(studies, start=1)
        },
    }


def note_pending(directory: Path, *, as_json: bool, interrupted: bool = False) -> NoReturn:
    """Say how an unfinished run is gone on with, and leave.

    Ids of jobs go to standard output, so that a script can keep them.
    """
    from persona_nnsight.backends.ndif.ledger import BACKEND, Ledger
    from persona_nnsight.storage.journal import Journal

    again = f"persona resume {directory}"
    ids: list[str] = []
    journal = Journal.load(directory)
    if journal.backend == BACKEND:
        from nnsight import CONFIG

        ledger = Ledger.of(journal)
        ids = [job.id for job in ledger.jobs.values() if job.id is not None]
        if ledger.host != CONFIG.API.HOST.rstrip("/"):  # then it is to be confirmed
            again += f" --ndif-host {shlex.quote(ledger.host)}"
        sent = "Interrupted; the jobs that were sent go on."
        what = sent if interrupted else "The jobs are sent."
        advice = f"`persona jobs {directory}` shows them, `{again}` collects them."
    else:
        what, advice = "Interrupted; what was finished is kept.", f"`{again}` goes on."
    if as_json:
        show_json({"complete": False, "out": str(directory), "jobs": ids})
    else:
        for identity in ids:
            say(identity)
    note(f"{what} {advice}")
    raise typer.Exit(130 if interrupted else 0)


def is_pending(directory: Path) -> bool:
    """Whether a directory holds a run that can be gone on with."""
    return (directory / PENDING).exists()
