"""Versions here and on a server: what differs, and whether it matters."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import InvalidVersion, Version

from persona_nnsight.errors import PersonaError

#: What a job depends on, and what a difference in the first two numbers of its version does.
_MATTERS = {
    "nnsight": "cannot read each other's jobs",
    "transformers": "may name a model's modules differently",
    "torch": "",
    "python": "",
}


@dataclass(frozen=True)
class VersionPair:
    """One library here and there.

    Attributes:
        name: of the library.
        here, there: versions; `there` is None where the server does not say.
        consequence: what the difference does; empty where it does nothing.
        fatal: whether no job can get through.
    """

    name: str
    here: str
    there: str | None
    consequence: str
    fatal: bool


def compare_versions(environment: Mapping[str, Any]) -> list[VersionPair]:
    """The libraries that matter, here and in a server's environment (`Server.environment`)."""
    packages: Mapping[str, Any] = environment.get("packages", {})
    pairs = []
    for name, consequence in _MATTERS.items():
        if name == "python":
            here = platform.python_version()
            words = str(environment.get("python_version", "")).split()
            there = words[0] if words else None
        else:
            here, found = version(name), packages.get(name)
            there = None if found is None else str(found)
        differs = there is None or _series(here) != _series(there)
        pairs.append(
            VersionPair(
                name=name,
                here=here,
                there=there,
                consequence=consequence if differs else "",
                fatal=differs and name == "nnsight",
            )
        )
    return pairs


def require_same_nnsight(environment: Mapping[str, Any], host: str) -> None:
    """Refuse a server whose nnsight writes jobs in another way than ours.

    Raises:
        PersonaError: with both versions and what to install.
    """
    pair = next(pair for pair in compare_versions(environment) if pair.name == "nnsight")
    if pair.fatal:
        theirs = pair.there or "no nnsight that it names"
        series = _series_text(pair.there or "")
        other = f"a release of persona-nnsight for nnsight {series}" if series else "another server"
        raise PersonaError(
            f"{host} runs nnsight {theirs} and this machine {pair.here}, which cannot read each "
            f"other's jobs; use {other}, or a server that runs {_series_text(pair.here)}.*."
        )


def _series(text: str) -> tuple[int, int] | None:
    """The first two numbers of a version."""
    try:
        parsed = Version(text)
    except InvalidVersion:
        return None
    return parsed.major, parsed.minor


def _series_text(text: str) -> str:
    return ".".join(map(str, _series(text) or ()))
