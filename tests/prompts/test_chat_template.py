"""Chat templates that write the date: a prompt is the same whenever and wherever it is rendered."""

from __future__ import annotations

import locale
from contextlib import suppress
from datetime import date, datetime
from pathlib import Path

import pytest
from tiny import CHATML, DATED, save_tokenizer
from zones import EARLY, LATE, zone

from persona_nnsight import PersonaError
from persona_nnsight.prompts.chat_template import _strftime, render, rendering_of
from persona_nnsight.prompts.encoding import encode_prompt
from persona_nnsight.prompts.rendering import Rendering

DAY = "2023-03-09"
HELLO = [("user", "Hello.")]

#: Asks what day it is if it can, and may be told; as Llama 3.2's.
ASKS_OR_IS_TOLD = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %B %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{{ 'Today Date: ' + date_string + '\n' }}" + CHATML
)
#: Has a date of its own, and may be told another; as Llama 3.1's.
IS_TOLD = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ 'Today Date: ' + date_string + '\n' }}" + CHATML
)
#: The date within a macro, and only for a conversation that has no system message.
IN_A_MACRO = (
    "{% macro today(format='%Y-%m-%d') %}{{ strftime_now(format) }}{% endmacro %}"
    "{% if messages[0]['role'] != 'system' %}{{ 'It is ' + today() + '\n' }}{% endif %}" + CHATML
)
WEEKDAY = "{{ strftime_now('%A') + '\n' }}" + CHATML
TIME_OF_DAY = "{{ strftime_now('%H:%M:%S %p') + '\n' }}" + CHATML
MOMENT = "{{ strftime_now('%Y-%m-%d %H:%M') + '\n' }}" + CHATML

TURN = "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (DATED, "Today Date: 09 March 2023\n"),
        (ASKS_OR_IS_TOLD, "Today Date: 09 March 2023\n"),
        (IS_TOLD, "Today Date: 09 Mar 2023\n"),
        (IN_A_MACRO, "It is 2023-03-09\n"),
        (WEEKDAY, "Thursday\n"),
        (MOMENT, "2023-03-09 12:00\n"),
    ],
)
def test_the_day_that_is_asked_for_is_written(tmp_path: Path, template: str, written: str) -> None:
    tokenizer = save_tokenizer(tmp_path, template)
    rendering = rendering_of(tokenizer, DAY)
    assert rendering == Rendering(DAY)
    assert render(tokenizer, HELLO, rendering).removeprefix("<|im_start|>system\n").replace(
        "<|im_end|>\n" + TURN, "\n" + TURN
    ) == (written + TURN)
    assert rendering_of(tokenizer, date(2023, 3, 9)) == rendering
    assert rendering_of(tokenizer, datetime(2023, 3, 9, 23, 59)) == rendering
    prompts = [
        encode_prompt(tokenizer, "Hello.", Rendering(day)).ids for day in (DAY, DAY, "2022-11-20")
    ]
    assert prompts[0] == prompts[1] != prompts[2]


@pytest.mark.parametrize("template", [DATED, ASKS_OR_IS_TOLD, IN_A_MACRO, WEEKDAY, MOMENT])
def test_otherwise_the_day_is_today(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = save_tokenizer(tmp_path, template)
    found = []
    for name in (EARLY, LATE):
        with zone(monkeypatch, name):
            found.append(rendering_of(tokenizer).date)
    assert found[0] is not None
    assert found[1] is not None
    assert found[0] < found[1]
    assert rendering_of(tokenizer, otherwise=DAY) == Rendering(DAY)
    assert rendering_of(tokenizer, "2022-11-20", otherwise=DAY) == Rendering("2022-11-20")


def test_a_template_keeps_the_date_that_it_has_of_its_own(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, IS_TOLD)
    assert rendering_of(tokenizer) == Rendering(None)
    assert render(tokenizer, HELLO, Rendering()).startswith("Today Date: 26 Jul 2024\n")
    # Vectors that were measured on another day take it with them.
    assert rendering_of(tokenizer, otherwise=DAY) == Rendering(DAY)


@pytest.mark.parametrize("template", [CHATML, TIME_OF_DAY])
def test_no_date(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = save_tokenizer(tmp_path, template)
    assert rendering_of(tokenizer) == rendering_of(tokenizer, otherwise=DAY) == Rendering(None)
    with pytest.raises(PersonaError, match=r"--date 2023-03-09 has no effect: .*writes no date"):
        rendering_of(tokenizer, DAY)
    with zone(monkeypatch, EARLY):
        there = render(tokenizer, HELLO, Rendering())
    with zone(monkeypatch, "XXX-7"):
        assert render(tokenizer, HELLO, Rendering()) == there
    assert ("12:00:00 PM" in there) == (template is TIME_OF_DAY)


@pytest.mark.parametrize("day", ["2024-02-30", "26 Jul 2024", "2024", "", "today", 20240726])
def test_what_is_no_day(tmp_path: Path, day: str) -> None:
    for template in (CHATML, DATED):
        with pytest.raises(PersonaError, match="is no day; write it as YYYY-MM-DD"):
            rendering_of(save_tokenizer(tmp_path, template), day)


#: Whatever Python has of them, in the C locale; `%Z` and `%z` are empty without a time zone.
DIRECTIVES = "a A w d b B m y Y H I M p S f j U W c x X % G u V h r Z z"


def test_the_day_is_written_in_english_in_every_locale() -> None:
    noon, format = datetime(2024, 5, 7, 12), " | ".join(f"%{one}" for one in DIRECTIVES.split())
    expected = noon.strftime(format + " | %-d %%B")
    known = locale.setlocale(locale.LC_TIME)
    try:
        for name in ("C", "de_DE.UTF-8", "fr_FR.UTF-8", "ja_JP.UTF-8"):
            with suppress(locale.Error):  # not installed
                locale.setlocale(locale.LC_TIME, name)
            assert _strftime(date(2024, 5, 7), format + " | %-d %%B") == expected
    finally:
        locale.setlocale(locale.LC_TIME, known)


def test_names_do_not_come_from_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no other locale is installed: what is left to the system has no names in it."""
    left: list[str] = []

    class Watched(datetime):
        def strftime(self, format: str) -> str:
            left.append(format)
            return super().strftime(format)

    monkeypatch.setattr("persona_nnsight.prompts.chat_template.datetime", Watched)
    assert _strftime(date(2024, 5, 7), "%A %a %d %B %b %h %p %c %x %X %%A") == (
        "Tuesday Tue 07 May May May PM Tue May  7 12:00:00 2024 05/07/24 12:00:00 %A"
    )
    assert left == ["Tuesday Tue %d May May May PM Tue May  7 12:00:00 2024 %m/%d/%y %H:%M:%S %%A"]


def test_control_text_is_that_of_the_day(tmp_path: Path) -> None:
    """A heading with the date in it is control text on that day."""
    template = "{{ '### ' + strftime_now('%d %b %Y') + '\n' }}{{ messages[0]['content'] }}"
    tokenizer = save_tokenizer(tmp_path, template)
    text = "Write ### 09 Mar 2023 over it."
    assert encode_prompt(tokenizer, text, Rendering("2023-03-10")).ids
    with pytest.raises(PersonaError, match="contains '### 09 Mar 2023'"):
        encode_prompt(tokenizer, text, Rendering(DAY))
    assert encode_prompt(tokenizer, text, Rendering("2023-03-10")).ids
