"""All architectures, each in a process of its own that has everything imported already."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence

import transformers.pipelines.text_generation  # noqa: F401

from architectures.building import Architecture
from architectures.verdict import TRACEBACK, Verdict, judge

LIMIT = 300
"""Seconds for one architecture."""


def sweep(architectures: Sequence[Architecture], workers: int) -> Iterator[Verdict]:
    """Judge them, in their order."""
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, maxtasksperchild=1) as pool:
        pending = [pool.apply_async(judge, (each, LIMIT)) for each in architectures]
        for architecture, result in zip(architectures, pending, strict=True):
            try:
                yield result.get(2 * LIMIT)
            except multiprocessing.TimeoutError:  # its process is gone
                yield Verdict(architecture, TRACEBACK, "the process ended without a word")
