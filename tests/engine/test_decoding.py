"""Decoding: the largest logit, whatever a checkpoint's generation settings say, or what they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import MARKED, TINY_GRID, cell_prompts, decode, reference_of
from commands import Persona
from tiny import make_model_dir
from transformers import AutoModelForCausalLM

from persona_nnsight import PersonaError, capture, load_model, markers, substitute
from persona_nnsight.models.decoding import decoding_of

ONE = TINY_GRID.select(["yoda"], ["haiku"])
FREQUENT = list(range(32, 127))

#: Settings that change greedy tokens, end decoding, or change what it returns.
SETTINGS: dict[str, Any] = {
    "suppress_tokens": FREQUENT,
    "begin_suppress_tokens": FREQUENT,
    "bad_words_ids": [[token] for token in FREQUENT],
    "sequence_bias": [[[token], -20.0] for token in FREQUENT],
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "forced_bos_token_id": 65,
    "forced_eos_token_id": 257,
    "exponential_decay_length_penalty": [1, 1.9],
    "min_new_tokens": 30,
    "min_length": 500,
    "max_length": 3,
    "max_new_tokens": 1,
    "max_time": 1e-9,
    "stop_strings": ["a", "e", " "],
    "eos_token_id": list(range(0, 256, 2)),
    "guidance_scale": 3.0,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 9.0},
    "num_beams": 3,
    "num_beam_groups": 3,
    "diversity_penalty": 0.5,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "top_k": 4,
    "do_sample": True,
    "temperature": 9.0,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 3,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "use_cache": False,
    "cache_implementation": "static",
    "prefill_chunk_size": 4,
    "low_memory": True,
    "token_healing": True,
    "early_stopping": True,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "compile_config": {"mode": "default"},
    "something_of_its_own": 3,
}
#: Of these, what changes logits the same way every time.
KEPT = {
    name: SETTINGS[name]
    for name in (
        *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
        *("repetition_penalty", "no_repeat_ngram_size"),
    )
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """A tiny model whose generation settings can be changed."""
    path = make_model_dir("llama", tmp_path_factory.mktemp("model"))
    plain = json.loads((path / "generation_config.json").read_text())

    def change(settings: dict[str, Any]) -> Path:
        (path / "generation_config.json").write_text(json.dumps({**plain, **settings}))
        return path

    return change


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_is_the_largest_logit(
    directory: Callable[[dict[str, Any]], Path], setting: str
) -> None:
    model = load_model(str(directory({setting: SETTINGS[setting]})))
    eos = model.eos_ids
    reference = reference_of(model)
    reference.eos = frozenset(eos)
    ids = reference.ids(cell_prompts(ONE, ONE.cells[0])["XY"])
    result = substitute(model, ONE, layers=(2,), positions="p_last", generate=6)
    assert list(result.continuations[0]) == reference.greedy(ids, 10)
    clean = next(text for text in result.texts if text.condition == "clean")
    assert clean.n_tokens == len(reference.greedy(ids, 6))


def plain_greedy(path: str, ids: torch.Tensor, n_tokens: int) -> list[int]:
    """What transformers decodes of one prompt, with the checkpoint's settings."""
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False
    )
    tokens: list[int] = found[0, ids.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("setting", KEPT)
def test_a_checkpoints_own_settings(
    directory: Callable[[dict[str, Any]], Path], setting: str
) -> None:
    """Where they are asked for: the tokens of transformers' own greedy decoding of one prompt."""
    path = str(directory({setting: SETTINGS[setting]}))
    model = load_model(path, decoding="checkpoint")
    assert list(model.decoding) == [setting]
    reference = reference_of(model)
    result = capture(model, TINY_GRID, layers=(2,), positions="p_last")
    assert result.where["path"]["name"] == "whole"
    changed = 0
    for number, cell in enumerate(TINY_GRID.cells):
        ids = torch.tensor([reference.ids(cell_prompts(TINY_GRID, cell)["XY"])])
        expected = plain_greedy(path, ids, 10)
        found = list(result.continuations[number])
        assert found == expected[: len(found)]
        assert len(found) == 10 or found[-1] in model.eos_ids
        changed += found != reference.greedy(ids[0].tolist(), 10)
    assert changed, "the setting changed nothing: the comparison above compared nothing"


def test_texts_keep_to_it_too(directory: Callable[[dict[str, Any]], Path]) -> None:
    path = str(directory({"suppress_tokens": FREQUENT}))
    model = load_model(path, decoding="checkpoint")
    result = markers(model, MARKED.select(["yoda"], ["haiku"]), layers="2", tokens=8)
    (clean,) = [text.text for text in result.texts if text.condition == "clean"]
    reference = reference_of(model)
    ids = torch.tensor([reference.ids(cell_prompts(ONE, ONE.cells[0])["XY"])])
    assert clean == decode(model, plain_greedy(path, ids, 8))
    assert clean != decode(model, reference.greedy(ids[0].tolist(), 8))


def test_what_is_drawn_or_changes_nothing_is_left_out() -> None:
    settings = {
        "do_sample": True,
        "temperature": 0.5,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "bad_words_ids": None,
        "sequence_bias": [[[3, 4], 2.0]],
    }
    assert decoding_of(settings, "greedy") == {}
    assert decoding_of(settings, "checkpoint") == {"sequence_bias": [[[3, 4], 2.0]]}


def test_the_record_names_the_settings(
    persona: Persona, directory: Callable[[dict[str, Any]], Path]
) -> None:
    path = directory({"suppress_tokens": [1, 2], "temperature": 0.3})
    run = ("capture", "-m", str(path), "--grid", "grid.yaml", "--layers", "2", "--out", "out")
    assert persona(*run, "--decoding", "checkpoint").code == 0
    record = json.loads(Path("out/run.json").read_text())
    assert record["decoding"] == {"name": "checkpoint", "settings": {"suppress_tokens": [1, 2]}}


def test_an_unknown_way_to_decode(directory: Callable[[dict[str, Any]], Path]) -> None:
    with pytest.raises(PersonaError, match="'beam' is not known; use greedy"):
        load_model(str(directory({})), decoding="beam")
