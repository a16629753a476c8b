"""Shared fixtures: tiny models of every family, and the embedded model, each loaded once."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads it then

# Workers share the cores, and so do the commands that they start; before torch is imported.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from cells import TINY_GRID
from commands import Outcome, Persona
from float64 import doubled, in_float64
from hypothesis import HealthCheck, settings
from ndif_server import NdifServer
from persona_cli.app import main
from tiny import make_model_dir

from persona_nnsight import Model, load_model

# The same examples every time, on a machine of any speed; `--hypothesis-profile=explore` draws
# many others.
_ANY_SPEED = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", _ANY_SPEED, derandomize=True)
settings.register_profile("explore", _ANY_SPEED, max_examples=3000)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directories of tiny models, by family and the options of `make_model_dir`."""
    root = tmp_path_factory.mktemp("tiny")

    @cache
    def build(family: str, **options: object) -> Path:
        name = family if not options else f"{family}-{len(list(root.iterdir()))}"
        return make_model_dir(family, root / name, **options)  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def tiny(tiny_dir: Callable[..., Path]) -> Callable[..., Model]:
    """Tiny models, loaded as a user loads a local directory."""

    @cache
    def build(family: str, **options: object) -> Model:
        return load_model(str(tiny_dir(family, **options)))

    return build


@pytest.fixture(scope="session")
def _doubled(tiny_dir: Callable[..., Path]) -> Callable[..., Model]:
    @cache
    def build(family: str, **options: object) -> Model:
        return doubled(load_model(str(tiny_dir(family, **options))))

    return build


@pytest.fixture
def tiny64(_doubled: Callable[..., Model]) -> Iterator[Callable[..., Model]]:
    """Tiny models in float64, from the first of them on: to be compared to ten digits."""
    with ExitStack() as stack:

        def build(family: str, **options: object) -> Model:
            stack.close()  # loading is in float32
            model = _doubled(family, **options)
            stack.enter_context(in_float64())
            return model

        yield build


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The embedded model; the first test that asks for it fetches and converts it."""
    return load_model("smollm2-135m")


@pytest.fixture
def persona(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Persona:
    """Run `persona ARGUMENTS` in an empty directory that holds grid.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(TINY_GRID.to_yaml(), encoding="utf-8")

    def command(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), streams.out, streams.err)

    return command


@pytest.fixture(scope="session")
def running_ndif(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NdifServer]:
    """A real NDIF server; started once, and stopped whatever happens."""
    server = NdifServer(state=tmp_path_factory.mktemp("ndif-server"))
    # Stopped from outside, tests would leave it running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.up()
        yield server
    finally:
        server.down()


@pytest.fixture
def ndif(running_ndif: NdifServer, monkeypatch: pytest.MonkeyPatch) -> NdifServer:
    """The server, as what `--backend ndif` finds without being told."""
    monkeypatch.setattr("nnsight.CONFIG.API.HOST", running_ndif.url)
    monkeypatch.setattr("nnsight.CONFIG.API.APIKEY", None)
    return running_ndif
