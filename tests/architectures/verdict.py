"""One architecture: from its configuration to a verdict."""

from __future__ import annotations

import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from float64 import doubled, in_float64
from transformers.utils import logging

from architectures.building import Architecture, build, save, windows_of
from architectures.comparison import Difference, compare, experiments, oracle
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
    differences, verdict = _differences(model)
    largest = max(each.kl for each in differences.values())
    told = f"KL off by {largest:.0e}"
    if not _are_within(differences, _TOLERANCES[torch.float32]):
        # Tokens that nearly tie, and many layers, make much of rounding: in float64 there is none.
        apart = "; ".join(f"{path}: {each}" for path, each in differences.items())
        wide = doubled(model)
        try:
            with in_float64():
                differences, verdict = _differences(wide)
        except Exception as error:
            told = f"{apart}; float64 fails ({_last_line(error)})"
            return Verdict(architecture, WRONG, told, loaded, largest)
        if not _are_within(differences, _TOLERANCES[torch.float64]):
            told = "; ".join(f"{path}: {each}" for path, each in differences.items())
            told = f"{apart}; in float64 {told}"
            return Verdict(architecture, WRONG, told, loaded, largest)
        told += f", in float64 by {max(each.kl for each in differences.values()):.0e}"
    if (matters := differences[AUTO].matters) < _MATTERS:
        told += f"; no edit has a KL above {matters:.0e}"
    return Verdict(architecture, verdict, told, loaded, largest)


def _differences(model: Model) -> tuple[dict[str, Difference], str]:
    """On the path that is chosen, and on the one of whole rows where that is another.

    The oracle comes last: what it cannot run either may have been refused.
    """
    found, paths = experiments(model)
    by_path = {AUTO: found}
    if FAST in paths:
        by_path[WHOLE], _ = experiments(replace(model, path=WHOLE))
    expected = oracle(model)
    verdict = EQUAL_FAST if paths == {FAST} else EQUAL_WHOLE
    return {path: compare(each, expected) for path, each in by_path.items()}, verdict


def _are_within(differences: dict[str, Difference], tolerance: float) -> bool:
    return all(each.within(tolerance) for each in differences.values())


def _failed(
    architecture: Architecture, verdict: str, error: Exception, loaded: str = ""
) -> Verdict:
    trace = "".join(traceback.format_exception(error))
    return Verdict(architecture, verdict, _last_line(error), loaded, trace=trace)


def _last_line(error: Exception) -> str:
    """The kind of an error, and the line of its message that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # What validates a configuration says where on a first line, and why on a second.
    says = lines[:2][-1] if "Validation" in type(error).__name__ else lines[0]
    return f"{type(error).__name__}: {says}"


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
