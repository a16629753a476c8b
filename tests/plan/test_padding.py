"""Padding of batches, and tokens that a model has no embedding for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import TINY_GRID
from tiny import PAD_ID, VOCAB_SIZE, TinyDir
from tokenizers import AddedToken
from transformers import AutoTokenizer

from persona_nnsight import PersonaError, load_model, substitute
from persona_nnsight.experiments.substitute import Substitute

WHERE: dict[str, Any] = {"layers": (2,), "positions": "p_last,g1", "conditions": "additive,bb"}


@pytest.fixture
def directory(tmp_path: Path, tiny_dir: TinyDir) -> Callable[..., Path]:
    """A copy of a tiny model whose tokenizer has more tokens than the model has embeddings."""

    def make(pad: str | None, *words: str) -> Path:
        path = shutil.copytree(tiny_dir("llama"), tmp_path / f"model-{pad}")
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens([AddedToken(word) for word in words])
        if pad is not None:
            tokenizer.add_special_tokens({"pad_token": pad})
        tokenizer.save_pretrained(path)
        return path

    return make


def test_padding_has_an_embedding(directory: Callable[..., Path], tiny_dir: TinyDir) -> None:
    """The numbers are those of the model whose tokenizer pads with a token that it knows."""
    model = load_model(str(directory("[PAD]")))
    assert model.tokenizer.pad_token_id == VOCAB_SIZE
    plan = Substitute(**WHERE).plan(model, TINY_GRID)
    assert plan.pad_id in plan.prompts[0].ids
    found = substitute(model, TINY_GRID, **WHERE)
    usual = load_model(str(tiny_dir("llama")))
    assert usual.tokenizer.pad_token_id == PAD_ID
    expected = substitute(usual, TINY_GRID, **WHERE)
    kl = torch.tensor(found.frame()["kl"].to_numpy())
    torch.testing.assert_close(kl, torch.tensor(expected.frame()["kl"].to_numpy()))


def test_a_token_without_an_embedding_is_refused_where_it_stands(
    directory: Callable[..., Path],
) -> None:
    model = load_model(str(directory(None, "Yoda", "unused")))
    assert substitute(model, TINY_GRID.select(["marx"]), **WHERE).scores
    with pytest.raises(PersonaError, match=f"has the token id {VOCAB_SIZE}, and the model knows 0"):
        substitute(model, TINY_GRID, **WHERE)


def test_an_embedding_may_have_more_rows_than_the_output(directory: Callable[..., Path]) -> None:
    """As Llama 3.2 Vision has one for the place of an image."""
    model = load_model(str(directory(None, "Yoda")))
    module = model.lm._module
    old = module.get_input_embeddings().weight
    wider = torch.nn.Embedding(VOCAB_SIZE + 8, old.shape[1])
    wider.weight.data[:VOCAB_SIZE] = old
    module.set_input_embeddings(wider.requires_grad_(False))
    assert (model.embedding_rows, model.tree.vocab_size) == (VOCAB_SIZE + 8, VOCAB_SIZE)
    assert substitute(model, TINY_GRID, **WHERE).scores
