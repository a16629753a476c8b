"""What a job took: wall time, the work that was really computed, and memory at its peak."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn

from benchmarks.work import Shapes, Work, decoder_layers, is_linear, lm_head
from persona_nnsight import Model

T = TypeVar("T")

#: Seconds between two looks at this process's memory.
_LOOK = 0.01


@dataclass(frozen=True)
class Measured:
    """What a job took; `peak_bytes` is what it held at most, beyond what was held before it."""

    seconds: float
    work: Work
    peak_bytes: int


def measure(model: Model, job: Callable[[], T]) -> tuple[T, Measured]:
    """Do a job on a model and say what it took; padding counts as work, as it is computed."""
    with counting(model) as count, _peak(model.device) as peak:
        start = time.perf_counter()
        result = job()
        synchronize(model.device)
        seconds = time.perf_counter() - start
    return result, Measured(seconds, count(), peak())


@contextmanager
def counting(model: Model) -> Iterator[Callable[[], Work]]:
    """Count the work of a model's forwards; what it yields says how much it was so far.

    Decoder layers are counted at a child that sees each token once, the MLP: the layer itself may
    be called and skipped.
    """
    tokens = {"layers": 0, "head": 0}

    def count(what: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
            tokens[what] += hidden.numel() // hidden.shape[-1]

        return hook

    watched = [("layers", _last_linear_child(layer)) for layer in decoder_layers(model)]
    watched.append(("head", lm_head(model)))
    handles = [
        module.register_forward_pre_hook(count(what), with_kwargs=True) for what, module in watched
    ]
    try:
        yield lambda: Work(tokens["layers"], tokens["head"])
    finally:
        for handle in handles:
            handle.remove()


def _last_linear_child(layer: nn.Module) -> nn.Module:
    with_maps = [child for child in layer.children() if any(map(is_linear, child.modules()))]
    return with_maps[-1]


def synchronize(device: str | torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak(device: str) -> Iterator[Callable[[], int]]:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - held
        return
    _give_back_freed()
    process = psutil.Process()
    before = highest = process.memory_info().rss
    done = threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(_LOOK):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: highest - before
    finally:
        done.set()
        thread.join()


def _give_back_freed() -> None:
    """Have glibc return freed memory, or what a job before held would hide what this one needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def matrix_rate(
    shapes: Shapes, dtype: torch.dtype, device: str, tokens: int = 1024, repeats: int = 3
) -> float:
    """FLOP/s of this machine's matrix products at the shapes of a model's layers.

    Each shape with `tokens` rows, the best of `repeats`; the shapes weigh as in the model.
    """
    several = 1 if torch.device(device).type == "cpu" else 20  # a launch is not to be timed
    flops = seconds = 0.0
    for (inputs, outputs), n in shapes.maps.items():
        rows = torch.randn(tokens, inputs, dtype=dtype, device=device)
        weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
        times = []
        for _ in range(repeats + 1):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(several):
                nn.functional.linear(rows, weight)
            synchronize(device)
            times.append((time.perf_counter() - start) / several)
        flops += n * 2 * tokens * inputs * outputs
        seconds += n * min(times[1:])
    return flops / seconds
