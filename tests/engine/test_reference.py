"""The oracle against itself and against transformers, on tiny models."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from reference import CONDITIONS, INJECTIONS, Reference, decomposition, grid_prompts, kl
from tiny import (
    CHATML,
    CHATML_DEFAULT_SYSTEM,
    EARLY_EOS_IDS,
    FAMILIES,
    IM_END_ID,
    IM_START_ID,
    MISTRAL_WINDOW,
    N_LAYERS,
    NO_SYSTEM,
    THINKING,
    VOCAB_SIZE,
    make_model_dir,
    save_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

PROMPTS = grid_prompts("Yoda", "Write a haiku.", "a person", "Give advice.", donor="Karl Marx")
POSITIONS = ("p_user_last", "p_last", "g1", "g2")


def load(directory: Path, eos: Collection[int] = (IM_END_ID,)) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(str(directory))
    tokenizer = cast(Any, AutoTokenizer).from_pretrained(str(directory))
    return Reference(model, tokenizer, eos)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    built: dict[str, Reference] = {}

    def get(family: str) -> Reference:
        if family not in built:
            built[family] = load(make_model_dir(family, tmp_path_factory.mktemp(family)))
        return built[family]

    return get


@pytest.fixture
def llama(references: Callable[[str], Reference]) -> Reference:
    return references("llama")


def generate(ref: Reference, ids: list[int], n: int) -> list[int]:
    tokens = torch.tensor([ids])
    output = cast(Any, ref.model).generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=n
    )
    return [int(i) for i in output[0, len(ids) :]]


@pytest.mark.parametrize("position", POSITIONS)
def test_writing_the_clean_residual_back_changes_nothing(llama: Reference, position: str) -> None:
    continuation = llama.continuation(PROMPTS, POSITIONS)
    assert len(continuation) == 12
    score = llama.substitution_kl(PROMPTS, position, 2, "clean", continuation)
    assert abs(score.kl) < 1e-6
    assert score.n_tokens == 10


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_vlm", "gpt2"])
def test_residual_is_hidden_states(references: Callable[[str], Reference], family: str) -> None:
    ref = references(family)
    ids = ref.ids(PROMPTS["XY"])
    with torch.no_grad():
        hidden = ref.model(
            torch.tensor([ids]), output_hidden_states=True, use_cache=False
        ).hidden_states
    for layer in range(N_LAYERS):
        for position in (0, 7, len(ids) - 1):
            got = ref.residual(ids, layer, position)
            assert torch.equal(got, hidden[layer][0, position])


def test_the_layers_of_an_unknown_family_are_where_they_are_said_to_be(llama: Reference) -> None:
    others = Reference(llama.model, llama.tokenizer, llama.eos, "model.layers")
    assert others.layers is llama.layers
    with pytest.raises(ValueError, match="no decoder layers"):
        Reference(llama.model, llama.tokenizer, llama.eos, "model.blocks")


def test_models_that_know_no_cache_are_not_told_to_use_none(tmp_path: Path) -> None:
    """OpenAI GPT takes no `use_cache`."""
    config = OpenAIGPTConfig(vocab_size=VOCAB_SIZE, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    OpenAIGPTLMHeadModel(config).save_pretrained(str(tmp_path))
    save_tokenizer(tmp_path)
    ref = load(tmp_path)
    ids = ref.ids(PROMPTS["XY"])
    assert ref.greedy(ids, 3) == generate(ref, ids, 3)


def test_every_layer_has_its_own_residual(llama: Reference) -> None:
    ids = llama.ids(PROMPTS["XY"])
    vectors = [llama.residual(ids, layer, len(ids) - 1) for layer in range(N_LAYERS)]
    for a, b in pairwise(vectors):
        assert (a - b).norm() > 0.1


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("condition", [c for c in CONDITIONS if c != "clean"])
def test_every_other_condition_moves_the_output(
    llama: Reference, position: str, condition: str
) -> None:
    continuation = llama.continuation(PROMPTS, POSITIONS)
    assert llama.substitution_kl(PROMPTS, position, 2, condition, continuation).kl > 1e-6


def test_conditions_are_what_they_say(llama: Reference) -> None:
    """Same persona twice: Δ_X is the persona effect, and each identity of §3 and §5 holds."""
    same = grid_prompts("a person", "Write a haiku.", "a person", "Give advice.", "a person")
    continuation = llama.continuation(same, ["p_last"])
    for condition in ("additive", "remove_x", "by", "clean", "other_x"):  # all equal h_XY here
        score = llama.substitution_kl(same, "p_last", 2, condition, continuation)
        assert abs(score.kl) < 1e-6
    for condition in ("bb", "xb", "remove_y"):
        assert llama.substitution_kl(same, "p_last", 2, condition, continuation).kl > 1e-3


def test_an_edit_acts_forward_and_at_its_position_only(llama: Reference) -> None:
    ids = llama.ids(PROMPTS["XY"])
    edits = {2: {20: torch.ones(32)}}
    clean = llama.logprobs(ids, 1, len(ids) - 1)
    patched = llama.logprobs(ids, 1, len(ids) - 1, edits)
    assert torch.equal(clean[:20], patched[:20])  # row i predicts i + 1: positions 0..19
    assert kl(clean[20:21], patched[20:21]) > 1e-3
    assert kl(clean[21:], patched[21:]) > 1e-3


def test_host_injection_ends_in_the_target(llama: Reference) -> None:
    continuation = llama.continuation(PROMPTS, ["p_last", "g2"])
    scores = {i: llama.injection_kl(PROMPTS, [1, 3], i, continuation) for i in INJECTIONS}
    assert all(s.kl > 1e-3 and s.n_tokens == 10 for s in scores.values())
    assert len({s.kl for s in scores.values()}) == len(INJECTIONS)
    # The last layer's p_last residual alone decides the first token: the oracle repairs it.
    last = llama.injection_kl(PROMPTS, [N_LAYERS - 1], "host", continuation, window=1)
    fixed = llama.injection_kl(PROMPTS, [N_LAYERS - 1], "oracle", continuation, window=1)
    assert fixed.kl < last.kl


def test_edited_greedy_differs_and_is_repeatable(llama: Reference) -> None:
    ids = llama.ids(PROMPTS["XY"])
    bb = llama.ids(PROMPTS["BB"])
    edits = {3: {len(ids) - 1: llama.residual(bb, 3, len(bb) - 1) * -1}}
    edited = llama.greedy(ids, 8, edits)
    assert edited == llama.greedy(ids, 8, edits)
    assert edited != llama.greedy(ids, 8)
    assert len(edited) == 8


def test_early_eos_is_kept_and_shortens_the_windows(tmp_path: Path) -> None:
    ref = load(make_model_dir("llama", tmp_path / "m", eos_early=True), EARLY_EOS_IDS)
    texts = [f"As {p}, {t}" for p in ("Yoda", "a clown", "Marx") for t in ("sing.", "advise me.")]
    continuations = [ref.greedy(ref.ids(text), 12) for text in texts]
    for text, tokens in zip(texts, continuations, strict=True):
        assert tokens == generate(ref, ref.ids(text), 12)
        assert not set(tokens[:-1]) & ref.eos
    assert any(len(tokens) < 12 for tokens in continuations)
    tokens = ref.greedy(ref.ids(PROMPTS["XY"]), 12)[:2]  # as if it had ended at g2
    assert ref.substitution_kl(PROMPTS, "p_last", 2, "bb", tokens).n_tokens == 2
    assert ref.substitution_kl(PROMPTS, "g1", 2, "bb", tokens).n_tokens == 1
    empty = ref.substitution_kl(PROMPTS, "g2", 2, "bb", tokens)
    assert empty.n_tokens == 0
    assert math.isnan(empty.kl)
    with pytest.raises(ValueError, match="g3"):
        ref.positions(PROMPTS["XY"], "g3", tokens)


def test_positions(llama: Reference) -> None:
    text = PROMPTS["XY"]
    ids, continuation = llama.ids(text), [1, 2, 3]
    assert llama.tokenizer.decode(ids) == (
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    sequence = ids + continuation
    assert llama.positions(text, "p_last", continuation) == len(ids) - 1
    assert sequence[llama.positions(text, "g1", continuation)] == 1
    assert sequence[llama.positions(text, "g3", continuation)] == 3
    before_header = llama.positions(text, "p_user_last", continuation)
    assert ids[before_header + 1] == IM_START_ID
    with pytest.raises(ValueError, match="unknown position"):
        llama.positions(text, "g0", continuation)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        (CHATML, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            CHATML_DEFAULT_SYSTEM,
            "<|im_start|>system\nYou are a helpful tiny model.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            NO_SYSTEM,
            "<|im_start|><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            THINKING,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
    ],
)
def test_templates(tmp_path: Path, template: str, rendered: str) -> None:
    ref = load(make_model_dir("llama", tmp_path / "m", chat_template=template))
    assert ref.tokenizer.decode(ref.ids("Hi")) == rendered
    if template == NO_SYSTEM:
        with pytest.raises(Exception, match="System role not supported"):
            ref.tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_no_template_is_refused(tmp_path: Path) -> None:
    ref = load(make_model_dir("gpt2", tmp_path / "m", chat_template=None))
    with pytest.raises(ValueError, match="chat_template"):
        ref.ids("Hi")


def test_decomposition_of_known_vectors() -> None:
    x, y = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    base = torch.tensor([1.0, 1.0])
    h = {"BB": base, "XB": base + x, "BY": base + y, "XY": base + x + y}
    found = decomposition(h)
    expected = {
        **{"cos_xy_sum": 1.0, "cos_xy_y": 0.8, "cos_xy_x": 0.6, "cos_x_y": 0.0},
        **{"inter_over_xy": 0.0, "rest_y": 0.6, "rest_x": 0.8},
    }
    assert found == pytest.approx(expected)
    other = decomposition({**h, "X'B": base - x})  # (3, 4) beside (-3, 4)
    assert other == pytest.approx({**expected, "cos_xy_other": 7 / 25, "rest_other": 6 / 5})
    assert decomposition(dict.fromkeys(h, base)) == dict.fromkeys(found, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(references: Callable[[str], Reference], family: str) -> None:
    ref = references(family)
    assert len(ref.layers) == N_LAYERS
    ids = ref.ids(PROMPTS["XY"])
    assert len(ids) > MISTRAL_WINDOW + 12
    continuation = ref.greedy(ids, 12)
    assert continuation == generate(ref, ids, 12)  # with a cache, sliding where it slides
    found = ref.logprobs([*ids, *continuation], len(ids), len(continuation))
    assert found.shape[0] == 12
    assert torch.isfinite(found).all()
    assert torch.allclose(found.exp().sum(-1), torch.ones(12), atol=1e-5)
    assert found.argmax(-1).tolist() == continuation
    for position in ("p_last", "g1"):
        for layer in (2, 3):
            score = ref.substitution_kl(PROMPTS, position, layer, "bb", continuation)
            assert score.kl > 1e-3, (position, layer, score)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_survives_the_round_trip(tmp_path: Path, family: str) -> None:
    ref = load(make_model_dir(family, tmp_path / "m", dtype=torch.bfloat16))
    assert ref.model.dtype == torch.bfloat16
    continuation = ref.continuation(PROMPTS, ["p_last"])
    assert ref.substitution_kl(PROMPTS, "p_last", 2, "clean", continuation).kl == 0.0
    assert ref.substitution_kl(PROMPTS, "p_last", 2, "bb", continuation).kl > 1e-3
