"""Shared fixtures: tiny models of every family, and the embedded model, each loaded once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads it then

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from reference import Reference
from tiny import make_model_dir

from persona_nnsight import Grid, Model, load_model

TINY_GRID = Grid.from_dict(
    {
        "name": "tiny",
        "baseline": {"persona": "someone", "task": "give some advice."},
        "personas": {"yoda": "Yoda", "marx": "Karl Marx, the author", "chef": "a head chef"},
        "tasks": {"haiku": "write a haiku.", "review": "review this very long plan in detail."},
    }
)


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
def smollm2() -> Model:
    """The embedded model; the first test that asks for it fetches and converts it."""
    return load_model("smollm2-135m")


def reference_of(model: Model) -> Reference:
    """The oracle on the same weights."""
    return Reference(model.lm._module, model.tokenizer)
