"""Fixtures for runs on the fake server, `fake_ndif.FakeNdif`; a file asks for those it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import nnsight
import pandas as pd
import pytest
from fake_ndif import KEY, Clock, FakeNdif, share_ssl_context, stop_clocks
from ndif_world import SMALL, TWO_BY_TWO, World
from tiny import Tiny, TinyDir

from persona_nnsight import Model, load_model, substitute
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.backends.ndif.backend import NdifBackend
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.plan import Plan


@pytest.fixture(scope="module")
def bare(tiny_dir: TinyDir) -> Model:
    """The model without its weights."""
    return load_model(str(tiny_dir("llama")), weights=False)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """An API key that must not turn up anywhere."""
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    share_ssl_context(monkeypatch)


@pytest.fixture
def fake(tiny: Tiny, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNdif]:
    """A server that computes, and that nnsight is configured for."""
    with FakeNdif(tiny("llama")) as server:
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.url)
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Nothing waits in earnest."""
    return stop_clocks(monkeypatch)


@pytest.fixture(scope="module")
def two_cells_a_job() -> Iterator[None]:
    """For the server's jobs and, so that numbers are equal, for batches on this machine."""
    sized = LocalBackend.limits

    def limits(self: Any, plan: Plan) -> Limits:
        return replace(sized(LocalBackend(self.model), plan), cells=2)

    with pytest.MonkeyPatch.context() as patched:
        for backend in (NdifBackend, LocalBackend):
            patched.setattr(backend, "limits", limits)
        yield


@pytest.fixture
def world(fake: FakeNdif, clock: Clock, bare: Model) -> World:
    return World(fake, clock, bare)


@pytest.fixture(scope="module")
def expected(tiny: Tiny, two_cells_a_job: None) -> pd.DataFrame:
    """What `World.run` has to give, computed here."""
    return substitute(tiny("llama"), TWO_BY_TWO, **SMALL).frame()
