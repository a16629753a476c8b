"""Chat templates of every kind, and where a prompt's positions are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cells import TINY_GRID
from tiny import CHATML, CHATML_DEFAULT_SYSTEM, NO_SYSTEM, THINKING, save_tokenizer

from persona_nnsight import PersonaError, capture
from persona_nnsight.prompts.encoding import encode_prompt

TEXT = "As Yoda, write a haiku."


def text_of(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids)))


@pytest.mark.parametrize(
    ("template", "before", "between", "header"),
    [
        (CHATML, "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
        (
            CHATML_DEFAULT_SYSTEM,
            "<|im_start|>system\nYou are a helpful tiny model.<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
        (
            NO_SYSTEM,
            "<|im_start|><start_of_turn>user\n",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
        ),
        (
            THINKING,
            "<|im_start|>user\n",
            "<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
    ],
)
def test_templates(tmp_path: Path, template: str, before: str, between: str, header: str) -> None:
    tokenizer = save_tokenizer(tmp_path, template)
    prompt = encode_prompt(tokenizer, TEXT)
    assert text_of(tokenizer, prompt.ids) == before + TEXT + between + header
    assert prompt.user_last is not None
    assert text_of(tokenizer, prompt.ids[: prompt.user_last + 1]) == before + TEXT + between
    assert text_of(tokenizer, prompt.ids[prompt.user_last + 1 :]) == header


def test_no_chat_template(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, None)
    with pytest.raises(PersonaError, match="has no chat template"):
        encode_prompt(tokenizer, TEXT)


def test_a_template_that_refuses(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, "{{ raise_exception('two turns at least') }}")
    with pytest.raises(PersonaError, match=r"refuses a single user message .*two turns at least"):
        encode_prompt(tokenizer, TEXT)


#: Ends a conversation with one token and a turn that is answered with another, as Phi-3's does.
CLOSING = (
    "{{ '<|im_start|>user\n' + messages[0]['content'] + '\n' }}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)


def test_a_template_without_an_end_of_the_user_turn(tmp_path: Path, tiny: Any) -> None:
    """It has no p_user_last; everything else works."""
    prompt = encode_prompt(save_tokenizer(tmp_path, CLOSING), TEXT)
    assert prompt.user_last is None
    model = tiny("phi3", chat_template=CLOSING)
    grid = TINY_GRID.select(["yoda"], ["haiku"])
    result = capture(model, grid, layers=(2,), positions="p_last,g1")
    assert result.frame()["cos_xy_sum"].notna().all()
    with pytest.raises(PersonaError, match="'p_user_last' does not exist with this model"):
        capture(model, grid, layers=(2,), positions="p_user_last")


def test_a_template_without_a_header(tmp_path: Path) -> None:
    """Nothing between the user turn and the answer: both prompt positions are one token."""
    tokenizer = save_tokenizer(tmp_path, "{{ '[INST] ' + messages[0]['content'] + ' [/INST]' }}")
    prompt = encode_prompt(tokenizer, TEXT)
    assert prompt.user_last == len(prompt.ids) - 1
