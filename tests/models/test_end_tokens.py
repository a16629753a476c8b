"""The tokens that end an answer, wherever a model gives them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cells import TINY_GRID, cell_prompts, reference_of
from tiny import CHATML, IM_END_ID, IM_START_ID, NO_SYSTEM, PAD, PAD_ID, VOCAB_SIZE, TinyDir
from tokenizers import AddedToken
from transformers import AutoTokenizer

from persona_nnsight import PersonaError, load_model, substitute
from persona_nnsight.models.end_tokens import answer_end

OTHER = 7
"""A token that no template writes."""


@pytest.fixture
def directory(tmp_path: Path, tiny_dir: TinyDir) -> Callable[..., Path]:
    """A copy of a tiny model whose files give other end tokens."""

    def make(
        family: str = "llama",
        *,
        generation: Any = None,
        config: Any = None,
        text: Any = None,
        tokenizer: str | None = None,
        template: str | None = None,
    ) -> Path:
        path = shutil.copytree(tiny_dir(family), tmp_path / "model")
        give(path / "generation_config.json", generation)
        give(path / "config.json", config, text)
        settings = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
        settings["eos_token"] = tokenizer
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        if template is None:
            (path / "chat_template.jinja").unlink()
        else:
            (path / "chat_template.jinja").write_text(template)
        return path

    return make


def give(file: Path, eos: Any, text: Any = None) -> None:
    """Give an end token in a file; None takes it out."""
    settings = json.loads(file.read_text("utf-8"))
    for part, value in ((settings, eos), (settings.get("text_config", {}), text)):
        part.pop("eos_token_id", None)
        if value is not None:
            part["eos_token_id"] = value
    file.write_text(json.dumps(settings))


def end_ids(path: Path) -> tuple[int, ...]:
    """Those of a model, and of one without weights, which plans with them."""
    ids = load_model(str(path)).eos_ids
    assert load_model(str(path), weights=False).eos_ids == ids
    return ids


def test_every_source_counts(directory: Callable[..., Path]) -> None:
    path = directory(generation=[3, 4], config=5, tokenizer=PAD, template=CHATML)
    assert end_ids(path) == (3, 4, 5, IM_END_ID, PAD_ID)


def test_the_text_models_part_counts(directory: Callable[..., Path]) -> None:
    path = directory("gemma3_vlm", config=5, text=[6, 8])
    settings = json.loads((path / "config.json").read_text("utf-8"))
    settings["vision_config"]["eos_token_id"] = OTHER  # of another model
    (path / "config.json").write_text(json.dumps(settings))
    assert end_ids(path) == (5, 6, 8)


@pytest.mark.parametrize("source", ["generation", "config", "tokenizer", "template"])
def test_one_source_is_enough(directory: Callable[..., Path], source: str) -> None:
    """None of the others, nor the default of the configuration's class (Llama's is 2)."""
    given: dict[str, Any] = {
        "generation": IM_END_ID, "config": IM_END_ID, "tokenizer": "<|im_end|>", "template": CHATML
    }  # fmt: skip
    assert end_ids(directory(**{source: given[source]})) == (IM_END_ID,)


def test_where_no_file_gives_one_the_class_does(directory: Callable[..., Path]) -> None:
    assert end_ids(directory()) == (2,)


def test_what_no_token_has_as_its_id_is_left_out(directory: Callable[..., Path]) -> None:
    path = directory(generation=[-1, 0, VOCAB_SIZE, 10**9], config=-1, template=CHATML)
    assert end_ids(path) == (0, IM_END_ID)


@pytest.mark.parametrize("source", ["generation", "config"])
@pytest.mark.parametrize("eos", ["x", [3, None], 2.0, True, {"a": 1}])
def test_an_end_token_is_a_number(directory: Callable[..., Path], source: str, eos: object) -> None:
    with pytest.raises(PersonaError):
        load_model(str(directory(**{source: eos})))


def test_an_answer_ends_where_its_template_ends_it(directory: Callable[..., Path]) -> None:
    """As where a model was taught another template than it came with."""
    path = directory(generation=OTHER, config=OTHER, tokenizer=PAD, template=CHATML)
    model = load_model(str(path))
    reference = reference_of(model)
    weights = model.lm._module.get_output_embeddings().weight
    grid = TINY_GRID.select(["yoda"], ["haiku"])
    ids = reference.ids(cell_prompts(TINY_GRID, grid.cells[0])["XY"])
    (second,) = reference.greedy(ids, 2)[1:]
    assert second not in (OTHER, PAD_ID, IM_END_ID)
    weights.data[IM_END_ID] = weights.data[second] * 1.001  # the answer ends after one token
    result = substitute(model, grid, layers=(2,), positions="p_last", conditions="bb", generate=6)
    assert list(result.continuations[0]) == reference.greedy(ids, 10)
    assert result.continuations[0][-1] == IM_END_ID
    assert {text.n_tokens for text in result.texts if text.condition == "clean"} == {2}


#: By case: a template, and the token that it ends an answer with.
TEMPLATES: dict[str, tuple[str | None, int | None]] = {
    "none": (None, None),
    "a mark at once": (CHATML, IM_END_ID),
    "white space first": (
        CHATML.replace("message['content'] + '", "message['content'] + ' \n\n'+'"),
        IM_END_ID,
    ),
    "plain text first": (
        CHATML.replace("message['content'] + '", "message['content'] + '[/ANSWER]'+'"),
        IM_END_ID,
    ),
    "two marks": (CHATML + "<pad>", IM_END_ID),
    "plain text alone": (NO_SYSTEM, None),
    "nothing": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}",
        None,
    ),
    "nothing behind the last": (
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}"
        "{% endfor %}",
        None,
    ),
    "the answer is left out": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}",
        None,
    ),
    "the answer is refused": (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}",
        None,
    ),
    "a broken template": ("{% for", None),
    "a token that is not called special": (
        "{% for m in messages %}{{ m.content }}<eot>{% endfor %}",
        VOCAB_SIZE,
    ),
    "a word that is a token": (
        "{% for m in messages %}{{ m.content }}Yoda{% endfor %}",
        None,
    ),
    "the first token again": (
        "{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}",
        IM_START_ID,
    ),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_token_that_a_template_ends_an_answer_with(tiny_dir: TinyDir, case: str) -> None:
    template, token = TEMPLATES[case]
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_dir("llama"))
    tokenizer.add_tokens([AddedToken("<eot>", special=False), AddedToken("Yoda", special=False)])
    tokenizer.chat_template = template
    assert answer_end(tokenizer) == token
