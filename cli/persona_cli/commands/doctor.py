"""`persona doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from persona_cli import options as o
from persona_cli.console import output, plain, show_json, spinner
from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    from persona_nnsight.backends.ndif.server import Server

_MARKS = {"ok": ("✓", "green"), "note": ("·", "yellow"), "problem": ("✗", "red")}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        verdict: ``ok``, ``note`` (works, but be aware of it) or ``problem`` (does not work).
        text: what was found, and what to do about a problem.
    """

    what: str
    verdict: str
    text: str


def doctor(
    *,
    model: o.ModelSpec = o.DEFAULT_MODEL,
    revision: o.Revision = None,
    backend: o.BackendName = "local",
    remote: o.Remote = False,
    ndif_host: o.NdifHost = None,
    insecure: o.Insecure = False,
    as_json: o.Json = False,
) -> None:
    """Check that this machine, and with --backend ndif a server, can run persona.

    Of a server: whether it answers, which versions it runs and whether a difference matters,
    whether an API key is set, and whether it has the model. Nothing is computed there.

    Exit code 0 when all is well, 1 when something does not work.

    Example: persona doctor --backend ndif --model google/gemma-2-2b-it
    """
    where = o.BackendOptions(backend, remote, ndif_host, insecure)
    with spinner("Looking"):
        findings = [*_this_machine(), _model_here(model, revision, weights=where.name != "ndif")]
        if where.name == "ndif":
            from persona_nnsight.backends.ndif.server import Server

            server = Server(ndif_host, insecure=insecure)
            findings += _server(server, model, revision)
        else:
            findings.append(_dtype_here())
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        mark, style = _MARKS[finding.verdict]
        what = plain(finding.what)
        what.stylize("bold")
        table.add_row(Text(mark, style=style), what, plain(finding.text))
    output().print(table)


def _this_machine() -> list[Finding]:
    """The versions installed here, against the ranges that this package asks for."""
    import platform
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    findings = [Finding("python", "ok", platform.python_version())]
    for line in requires("persona-nnsight") or []:
        requirement = Requirement(line)
        if requirement.name not in ("nnsight", "torch", "transformers") or requirement.marker:
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            text = f"is not installed; pip install '{line}'"
            findings.append(Finding(requirement.name, "problem", text))
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        text = found if fits else f"{found}, and persona needs {requirement.specifier}"
        findings.append(Finding(requirement.name, "ok" if fits else "problem", text))
    return findings


def _dtype_here() -> Finding:
    """What a run computes in where nothing is asked for, and what that costs."""
    from persona_nnsight.models.loading import default_placement
    from persona_nnsight.models.module_tree import has_few_bits

    device, dtype = default_placement()
    rounds = has_few_bits(dtype)
    cost = (
        "rounding shows in KLs (condition rounded); --dtype float32 takes twice the memory"
        if rounds
        else "rounding stays below 1e-5 nats"
    )
    name = str(dtype).removeprefix("torch.")
    return Finding("dtype", "note" if rounds else "ok", f"{name} on {device}: {cost}")


def _model_here(spec: str, revision: str | None, *, weights: bool) -> Finding:
    """Whether the model's files are here; for a server its configuration and tokenizer will do."""
    from persona_nnsight.models.weights.resolve import resolve

    try:
        found = resolve(spec, revision=revision, fetch=False, weights=weights)
    except PersonaError as error:
        # A run fetches what is missing, so this is no obstacle.
        return Finding("model here", "note", str(error))
    what = "weights" if weights else "configuration and tokenizer"
    return Finding("model here", "ok", f"{what} of {found.model_id}")


def _server(server: Server, spec: str, revision: str | None) -> list[Finding]:
    from persona_nnsight.backends.ndif.server import NoAnswerError

    try:
        connected = server.connected()
    except NoAnswerError as error:
        return [Finding("server", "problem", f"{server.host} does not answer ({error})")]
    state = "answers" if connected else "answers, but has lost its compute; try again later"
    findings = [Finding("server", "ok" if connected else "problem", f"{server.host} {state}")]
    findings.append(_key(server))
    try:
        findings += _versions(server.environment())
    except (PersonaError, NoAnswerError) as error:
        findings.append(Finding("versions there", "problem", str(error)))
    try:
        findings.append(_model_there(server, spec, revision))
    except (PersonaError, NoAnswerError) as error:
        findings.append(Finding("model there", "problem", str(error)))
    return findings


def _key(server: Server) -> Finding:
    from persona_nnsight.backends.ndif.server import NoAnswerError

    if not server.has_key:
        text = "none is set (NDIF_API_KEY); a server that asks for one will refuse work"
        return Finding("API key", "note", text)
    try:
        owner = server.identity()
    except NoAnswerError:
        owner = None
    known = f"is set and belongs to {owner}" if owner else "is set; the server names no owner"
    return Finding("API key", "ok" if owner else "note", known)


def _versions(environment: dict[str, Any]) -> list[Finding]:
    from persona_nnsight.backends.ndif.versions import compare_versions

    findings = []
    for pair in compare_versions(environment):
        verdict = "problem" if pair.fatal else "note" if pair.consequence else "ok"
        there = pair.there or "not named"
        text = f"{there} there, {pair.here} here"
        if pair.consequence:
            text += f": these {pair.consequence}"
        findings.append(Finding(f"{pair.name} there", verdict, text))
    return findings


def _model_there(server: Server, spec: str, revision: str | None) -> Finding:
    """Whether the server runs the model; it is not asked to start it."""
    from persona_nnsight.backends.ndif.backend import model_key
    from persona_nnsight.backends.ndif.server import is_loopback
    from persona_nnsight.models.loading import load_model

    model = load_model(spec, revision=revision, weights=False)
    if model.weights.is_local and not is_loopback(server.host):
        text = f"{spec} is only on this machine; name a hub model by --model"
        return Finding("model there", "note", text)
    there = server.deployments()
    states = list(there.get(model_key(model, server.host), {}).values())
    if "RUNNING" in states:
        count = states.count("RUNNING")
        replicas = "one replica" if count == 1 else f"{count} replicas"
        return Finding("model there", "ok", f"{spec} is running ({replicas})")
    if set(states) == {"COLD"}:
        text = f"{spec} is not running, and can be started: the first job does"
        return Finding("model there", "note", text)
    if states:
        return Finding("model there", "note", f"{spec} is {', '.join(states).lower()}")
    others = ", ".join(sorted(map(_named, there))) or "none"
    text = (
        f"{spec} is unknown to the server so far; the first job asks it to start the model, which "
        f"it does if it can and may. It has: {others}"
    )
    return Finding("model there", "note", text)


def _named(key: str) -> str:
    """The checkpoint in a model key."""
    try:
        return str(json.loads(key.partition(":")[2])["repo_id"])
    except (ValueError, KeyError, TypeError):
        return key
