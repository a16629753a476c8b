"""One architecture from a configuration to a verdict."""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures.building import Architecture, build, has_windows, save
from architectures.comparison import Difference, compare, oracle
from architectures.configs import LONG, SHORT
from float64 import doubled, in_float64
from transformers import PreTrainedModel
from transformers.utils import logging

from persona_nnsight import Model, PersonaError, load_model
from persona_nnsight.models.paths import AUTO, FAST, WHOLE

EQUAL_FAST, EQUAL_WHOLE = "equal (fast)", "equal (whole)"
REFUSED, NOT_BUILT, WRONG, TRACEBACK = "refused", "not built", "wrong", "traceback"
_ORDER = (EQUAL_FAST, EQUAL_WHOLE, REFUSED, NOT_BUILT, WRONG, TRACEBACK)
FAILURES = (WRONG, TRACEBACK)

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""In nats, and of residuals in relation to their norm."""


@dataclass(frozen=True)
class Verdict:
    """What came of an architecture.

    Attributes:
        architecture: which.
        verdict: one of `_ORDER`.
        why: the sentence, the difference, or the last line of a traceback.
        loaded: the class that was loaded, where one was.
        difference: the largest of a KL, in nats, where some were compared.
        trace: the whole traceback, if there is one.
    """

    architecture: Architecture
    verdict: str
    why: str = ""
    loaded: str = ""
    difference: float | None = None
    trace: str = ""


def judge(architecture: Architecture, limit: int) -> Verdict:
    """Build it, load it, run the experiments on it, and compare; the worst of its variants.

    Args:
        architecture: which.
        limit: seconds that it may take.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with _time_limit(limit):
        try:
            windows = (LONG, SHORT) if has_windows(architecture) else (LONG,)
        except Exception as error:
            return _failed(architecture, NOT_BUILT, error)
        found = []
        for window in windows:
            found.append(_variant(architecture, window))
    return max(found, key=lambda verdict: _ORDER.index(verdict.verdict))


def _variant(architecture: Architecture, window: int) -> Verdict:
    with tempfile.TemporaryDirectory() as directory:
        try:
            model = build(architecture, window)
            save(model, Path(directory))
        except Exception as error:
            return _failed(architecture, NOT_BUILT, error)
        loaded = ""
        try:
            skeleton = load_model(directory, weights=False)
            mine = load_model(directory, dtype="float32", device="cpu")
            loaded = type(mine.lm._module).__name__
            return _compared(architecture, mine, loaded)
        except PersonaError as error:
            why = str(error).replace(directory, "…").replace(Path(directory).name, "…")
            return Verdict(architecture, REFUSED, why, loaded)
        except Exception as error:
            return _failed(architecture, TRACEBACK, error, loaded)


def _compared(architecture: Architecture, model: Model, loaded: str) -> Verdict:
    differences = _differences(model)
    largest = max(each.kl for each in differences.values())
    tolerance = _TOLERANCE[model.dtype]
    if not all(each.within(tolerance) for each in differences.values()):
        rounded = differences
        try:
            wide = doubled(model)
            with in_float64():
                differences = _differences(wide)
            tolerance = _TOLERANCE[torch.float64]
        except Exception:
            differences = rounded
    first = differences[AUTO]
    verdict = EQUAL_FAST if first.paths == {FAST} else EQUAL_WHOLE
    for path, each in differences.items():
        if not each.within(tolerance):
            took = f"{path}, which took {'+'.join(sorted(each.paths))}: " if path == AUTO else f"{path}: "
            return Verdict(architecture, WRONG, f"{took}{each}", loaded, largest)
    why = "" if first.matters > 1e-3 else f"no KL above {first.matters:.1e}"
    return Verdict(architecture, verdict, why, loaded, largest)


def _differences(model: Model) -> dict[str, Difference]:
    expected = oracle(model)
    found = {AUTO: compare(model, AUTO, expected)}
    if FAST in found[AUTO].paths:
        found[WHOLE] = compare(model, WHOLE, expected)
    return found


def _failed(
    architecture: Architecture, verdict: str, error: Exception, loaded: str = ""
) -> Verdict:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    reason = max(lines[:2], key=len) if "Validat" in type(error).__name__ else lines[0]
    why = f"{type(error).__name__}: {reason.strip()}"
    return Verdict(architecture, verdict, why, loaded, trace="".join(traceback.format_exception(error)))


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
