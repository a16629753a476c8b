"""Few bits: what is rounding in a KL, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cells import TINY_GRID
from tiny import Tiny, TinyDir

from persona_nnsight import Grid, Model, load_model, steer, substitute
from persona_nnsight.engine import clean
from persona_nnsight.engine.fast import runs
from persona_nnsight.engine.wide_logits import wide_logits

DTYPES = ("bfloat16", "float16")
LAYERS, POSITIONS = (0, 2, 4), "p_user_last,p_last,g1,g2"


def medians(model: Model, grid: Grid, **options: Any) -> Any:
    summary = substitute(model, grid, **options).summary()
    return summary.set_index(["position", "layers", "condition"])["median"].unstack()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_writing_back_what_was_there_changes_nothing(
    tiny_dir: TinyDir, family: str, dtype: str
) -> None:
    model = load_model(str(tiny_dir(family)), dtype=dtype)
    frame = substitute(model, TINY_GRID, layers=LAYERS, positions=POSITIONS).frame()
    clean = frame[frame["condition"] == "clean"]["kl"]
    assert len(clean) == 6 * 3 * 4
    assert clean.abs().max() < 1e-6
    rounded = frame[frame["condition"] == "rounded"]["kl"]
    assert rounded.max() > 1e-6, "rounding never showed: the comparison above compared nothing"


def test_rounded_is_there_in_few_bits_alone(tiny: Tiny, tiny_dir: TinyDir) -> None:
    low = load_model(str(tiny_dir("llama")), dtype="bfloat16")
    for model, there in ((tiny("llama"), False), (low, True)):
        for conditions in (None, "additive"):
            table = substitute(model, TINY_GRID, layers=(2,), conditions=conditions).frame()
            assert ("rounded" in set(table["condition"])) == there
    table = substitute(tiny("llama"), TINY_GRID, layers=(2,), conditions="rounded").frame()
    assert table[table["condition"] == "rounded"]["kl"].max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_products_in_float32(tiny_dir: TinyDir, dtype: str) -> None:
    model = load_model(str(tiny_dir("llama")), dtype=dtype)
    module = model.lm._module
    ids = torch.arange(1, 9)[None]
    rounded, state = (
        module(ids).logits,
        module(ids, output_hidden_states=True).hidden_states[-1],
    )
    with wide_logits(model.lm):
        wide = module(ids).logits
    assert wide.dtype == torch.float32
    # The last hidden state has been through the last norm.
    weight = module.lm_head.weight
    assert torch.allclose(wide, state.double().matmul(weight.double().T).float(), atol=1e-5)
    assert torch.equal(wide.to(rounded.dtype), rounded) or (wide - rounded).abs().max() > 0
    assert module(ids).logits.dtype == rounded.dtype


def test_float32_is_left_as_it_is(tiny: Tiny) -> None:
    head = tiny("llama").lm._module.lm_head
    before = vars(head).get("forward")
    with wide_logits(tiny("llama").lm):
        assert vars(head).get("forward") is before


def test_a_model_is_put_back_as_it_was(tiny_dir: TinyDir) -> None:
    model = load_model(str(tiny_dir("llama")), dtype="bfloat16")
    head = model.lm._module.lm_head
    for kept in (None, lambda hidden: hidden):
        if kept is not None:
            head.forward = kept
        before = vars(head).get("forward")
        with wide_logits(model.lm):
            assert vars(head)["forward"] is not before
        assert vars(head).get("forward") is before


def test_an_edited_row_is_set_against_one_of_its_own_batch(
    tiny_dir: TinyDir, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it must be where a row comes out otherwise in a batch of another shape."""
    asked: list[tuple[str, str, bool]] = []

    def watched(chunk: Any, edit: Any) -> bool:
        found = own(chunk, edit)
        if not edit.is_unedited:
            asked.append((str(chunk.dtype), edit.host, found))
        return found

    own = clean.has_own_reference
    for module in (runs, clean):
        monkeypatch.setattr(module, "has_own_reference", watched)
    low = load_model(str(tiny_dir("llama")), dtype="bfloat16")
    for model in (low, tiny("llama")):
        for host in ("xy", "by"):
            steer(model, TINY_GRID, layers=(2,), alpha="1", host=host)
    assert set(asked) == {
        ("torch.bfloat16", "XY", True),
        ("torch.bfloat16", "BY", False),
        ("torch.float32", "XY", False),
        ("torch.float32", "BY", False),
    }
