"""A model's chat template: from messages to text, the same text whenever and wherever.

A template is a program. It may ask for the time of day (``strftime_now``) or take the date as a
variable (``date_string``): then prompts would change from one day to the next, and with the time
zone. So the day is fixed (`Rendering`), it is noon of that day, and names are English whatever the
locale. Whether a template writes a date is found by rendering under two.
"""

from __future__ import annotations

import re
from calendar import timegm
from collections.abc import Sequence
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

from persona_nnsight.errors import PersonaError
from persona_nnsight.prompts.rendering import UNDATED, Day, Rendering, parse_day

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: (role, content) each.
Messages = Sequence[tuple[str, str]]

#: Messages that stand in no template, that a template has no reason to change, and that end in
#: what a mark may stand beside.
PROBES = (".Qxkzvone.", ".Qxkzvtwo.", ".Qxkzvthree.")

#: What a template that writes no date has for today: anything, as long as it is always the same.
_ANY_DAY = date(2024, 7, 26)
#: Days of which nothing is the same: year, month, day, or day of the week.
_APART = (date(1987, 3, 14), date(2025, 11, 26))
#: How templates that take the date as a variable write it.
_DATE_STRING = "%d %b %Y"

_DIRECTIVE = re.compile(r"%[-_0]?(.)", re.DOTALL)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    rendering: Rendering,
    *,
    generation_prompt: bool = True,
) -> str:
    """The chat template's text for some messages.

    A thinking switch, where a template has one, is off.

    Raises:
        PersonaError: no chat template, or one that refuses the messages.
    """
    if rendering.date is None:
        return _applied(tokenizer, messages, _ANY_DAY, generation_prompt)[0]
    day = date.fromisoformat(rendering.date)
    text, asked = _applied(tokenizer, messages, day, generation_prompt)
    if asked:
        return text
    written = _strftime(day, _DATE_STRING)
    return _applied(tokenizer, messages, day, generation_prompt, date_string=written)[0]


def rendering_of(
    tokenizer: PreTrainedTokenizerBase, day: Day | None = None, otherwise: str | None = None
) -> Rendering:
    """How a run renders its prompts.

    Args:
        tokenizer: with the chat template.
        day: what was asked for.
        otherwise: the day where none was asked for and the template takes one; None for today,
            where the template writes today's date.

    Raises:
        PersonaError: no day, or one that the template does not write.
    """
    probe = [("user", "Hello.")]
    told = {render(tokenizer, probe, Rendering(each.isoformat())) for each in _APART}
    if len(told) == 1:
        if day is not None:
            raise PersonaError(
                f"--date {parse_day(day)} has no effect: the chat template of "
                f"{tokenizer.name_or_path!r} writes no date; leave it out."
            )
        return UNDATED
    if day is not None:
        return Rendering(parse_day(day))
    if otherwise is not None:
        return Rendering(otherwise)
    untold = {_applied(tokenizer, probe, each, generation_prompt=True)[0] for each in _APART}
    return Rendering(date.today().isoformat()) if len(untold) > 1 else UNDATED


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    day: date,
    generation_prompt: bool,
    **variables: Any,
) -> tuple[str, bool]:
    """The text on a day, and whether the template asked for the time."""
    if tokenizer.chat_template is None:
        raise PersonaError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, so there is no "
            "user turn to put a role prompt in; use an instruction-tuned model, or add a "
            "chat_template.jinja to the model's directory."
        )
    asked = False

    def strftime_now(format: str) -> str:
        nonlocal asked
        asked = True
        return _strftime(day, format)

    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            enable_thinking=False,
            strftime_now=strftime_now,
            **variables,
        )
    except Exception as error:  # a template is a program, and can trip in any way
        reason = " ".join(str(error).split())
        raise PersonaError(
            f"The chat template of {tokenizer.name_or_path!r} refuses a single user message "
            f"({reason}); use an instruction-tuned model whose template takes one."
        ) from error
    return str(text), asked


def _strftime(day: date, format: str) -> str:
    """Noon of a day, with the names and orders of the C locale."""
    noon = datetime.combine(day, time(12))
    weekday, month = _WEEKDAYS[day.weekday()], _MONTHS[day.month - 1]
    fixed = {
        **{"A": weekday, "a": weekday[:3], "B": month, "b": month[:3], "h": month[:3]},
        **{"p": "PM", "P": "pm", "c": noon.ctime(), "x": "%m/%d/%y", "X": "%H:%M:%S"},
        "r": "%I:%M:%S PM",
        "s": str(timegm(noon.timetuple())),
    }
    return noon.strftime(_DIRECTIVE.sub(lambda found: fixed.get(found[1], found[0]), format))
