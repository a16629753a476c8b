"""One architecture: from its configuration to a verdict."""

from __future__ import annotations

import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from float64 import doubled, in_float64
from transformers.utils import logging

from architectures.building import Architecture, build, save, windows_of
from architectures.comparison import Difference, compare, oracle
from persona_nnsight import Model, PersonaError, load_model
from persona_nnsight.models.paths import AUTO, FAST, WHOLE

EQUAL_FAST, EQUAL_WHOLE = "equal (fast)", "equal (whole)"
REFUSED, NOT_BUILT, WRONG, TRACEBACK = "refused", "not built", "wrong", "traceback"
ORDER = (EQUAL_FAST, EQUAL_WHOLE, REFUSED, NOT_BUILT, WRONG, TRACEBACK)
"""What may come out, the best first."""
FAILURES = (WRONG, TRACEBACK)

_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
"""In nats, and of residuals in relation to their norm."""
_MATTERS = 1e-3
"""Nats: where every edit costs less, nothing was compared."""


@dataclass(frozen=True)
class Verdict:
    """What came of an architecture.

    Attributes:
        architecture: which.
        verdict: one of `ORDER`.
        told: the sentence of a refusal, the difference, or the last line of a traceback.
        loaded: the class that was loaded, where one was.
        difference: the largest of a KL, in nats, where some were compared.
        trace: the whole traceback, if there is one.
    """

    architecture: Architecture
    verdict: str
    told: str = ""
    loaded: str = ""
    difference: float = 0.0
    trace: str = ""


def judge(architecture: Architecture, limit: int) -> Verdict:
    """Build it, load it, run the experiments on it and compare them.

    Args:
        architecture: which.
        limit: seconds that it may take.

    Returns:
        The worst of what came of its windows.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    try:
        windows = windows_of(architecture)
    except Exception as error:
        return _failed(architecture, NOT_BUILT, error)
    found = [_variant(architecture, window, limit) for window in windows]
    return max(found, key=lambda each: (ORDER.index(each.verdict), each.difference))


def _variant(architecture: Architecture, window: int, limit: int) -> Verdict:
    with tempfile.TemporaryDirectory() as directory, _time_limit(limit):
        try:
            model = build(architecture, window)
            save(model, Path(directory))
        except Exception as error:
            return _failed(architecture, NOT_BUILT, error)
        loaded = ""
        try:
            skeleton = load_model(directory, weights=False)
            own = load_model(directory, dtype="float32", device="cpu")
            loaded = type(own.lm._module).__name__
            if skeleton.tree != own.tree:
                return Verdict(architecture, WRONG, "without weights it has another tree", loaded)
            return _compared(architecture, own, loaded)
        except PersonaError as error:
            told = str(error).replace(directory, "…").replace(Path(directory).name, "…")
            return Verdict(architecture, REFUSED, told, loaded)
        except Exception as error:
            return _failed(architecture, TRACEBACK, error, loaded)


def _compared(architecture: Architecture, model: Model, loaded: str) -> Verdict:
    differences = _differences(model)
    largest = max(each.kl for each in differences.values())
    told = f"KL off by {largest:.0e}"
    if not _are_within(differences, _TOLERANCES[torch.float32]):
        # Tokens that nearly tie, and many layers, make much of rounding: in float64 there is none.
        rounded = differences
        wide = doubled(model)
        with in_float64():
            differences = _differences(wide)
        if not _are_within(differences, _TOLERANCES[torch.float64]):
            told = "; ".join(f"{path}: {each}" for path, each in rounded.items())
            in_64 = "; ".join(f"{path}: {each}" for path, each in differences.items())
            told = f"{told}; in float64 {in_64}"
            return Verdict(architecture, WRONG, told, loaded, largest)
        told += ", in float64 by " + f"{max(each.kl for each in differences.values()):.0e}"
    first = differences[AUTO]
    verdict = EQUAL_FAST if first.paths == {FAST} else EQUAL_WHOLE
    if first.matters < _MATTERS:
        told += f"; no edit has a KL above {first.matters:.0e}"
    return Verdict(architecture, verdict, told, loaded, largest)


def _differences(model: Model) -> dict[str, Difference]:
    """On the path that is chosen, and on the one of whole rows where that is another."""
    expected = oracle(model)
    found = {AUTO: compare(model, AUTO, expected)}
    if FAST in found[AUTO].paths:
        found[WHOLE] = compare(model, WHOLE, expected)
    return found


def _are_within(differences: dict[str, Difference], tolerance: float) -> bool:
    return all(each.within(tolerance) for each in differences.values())


def _failed(
    architecture: Architecture, verdict: str, error: Exception, loaded: str = ""
) -> Verdict:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What validates a configuration says which field on a first line, and why on a second.
    reason = (
        lines[1 if "alidation" in type(error).__name__ and len(lines) > 1 else 0] if lines else ""
    )
    told = f"{type(error).__name__}: {reason}"
    trace = "".join(traceback.format_exception(error))
    return Verdict(architecture, verdict, told, loaded, trace=trace)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
