"""How long a user waits for `persona --help`, and for a model to be ready in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

_HELP = ("-m", "persona_cli", "--help")
_LOAD = "import sys; from persona_nnsight import load_model; load_model(sys.argv[1], fetch=False)"


@dataclass(frozen=True)
class Startup:
    """Seconds, the best of several fresh processes, and what they should be below."""

    what: str
    seconds: float
    limit: float


def startup(model: str) -> list[Startup]:
    """Time both, for a model that is on this machine.

    Raises:
        subprocess.CalledProcessError: one of them fails.
    """
    return [
        Startup("persona --help", fresh(_HELP, times=5), 0.5),
        Startup(f"load_model({model!r})", fresh(("-c", _LOAD, model), times=3), 6.0),
    ]


def fresh(arguments: Sequence[str], times: int) -> float:
    """Seconds that this interpreter takes with `arguments`, the best of so many times."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
