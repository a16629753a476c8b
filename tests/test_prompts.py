"""Chat templates of every kind, and where a prompt's positions are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, CHATML_DEFAULT_SYSTEM, NO_SYSTEM, THINKING, save_tokenizer

from persona_nnsight import PersonaError
from persona_nnsight.prompts import encode_prompt

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


def test_a_template_whose_header_changes_the_user_turn(tmp_path: Path) -> None:
    template = (
        "{% if add_generation_prompt %}{{ 'Q: ' + messages[0]['content'] + ' A:' }}"
        "{% else %}{{ messages[0]['content'] }}{% endif %}"
    )
    tokenizer = save_tokenizer(tmp_path, template)
    with pytest.raises(PersonaError, match="does not put the generation prompt after"):
        encode_prompt(tokenizer, TEXT)


def test_a_template_without_a_header(tmp_path: Path) -> None:
    """Nothing between the user turn and the answer: both prompt positions are one token."""
    tokenizer = save_tokenizer(tmp_path, "{{ '[INST] ' + messages[0]['content'] + ' [/INST]' }}")
    prompt = encode_prompt(tokenizer, TEXT)
    assert prompt.user_last == len(prompt.ids) - 1
