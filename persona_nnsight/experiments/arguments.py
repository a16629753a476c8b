"""Arguments of experiments, each said once: for the call in Python and for the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from persona_nnsight.analysis.columns import MARGIN

#: A site expression, such as ``4-12`` or ``25%,40%``, or the numbers or names themselves.
Layers = str | int | Iterable[int]
Positions = str | Iterable[str]

#: The groups of options under which the help lists arguments.
MODEL, SITES, OUTPUT, STEERING = "Model", "Sites and measure", "Output", "Steering"

DATE_HELP = "The day that goes into prompts, where the chat template writes the date."


@dataclass(frozen=True)
class Option:
    """How an argument is given on a command line.

    Attributes:
        help: one or two sentences.
        names: such as ``--layers`` and ``-l``; none where the argument's own name will do.
        group: the heading that the help lists it under.
        type: what is typed, ``str``, ``int``, ``bool`` or ``Path``.
        metavar: what the help calls the value, where the type says too little.
        default: what the help says is taken where nothing is given; False to say nothing.
    """

    help: str
    names: tuple[str, ...]
    group: str
    type: Any
    metavar: str | None
    default: str | bool


def argument(
    default: Any,
    help: str,
    *names: str,
    group: str = SITES,
    type: Any = None,
    metavar: str | None = None,
    shown: str | bool = True,
) -> Any:
    """A field of an experiment that is also an option of its command; see `Option`."""
    kind = type or (str if default is None else default.__class__)
    option = Option(help, names, group, kind, metavar, shown)
    return field(default=default, metadata={"option": option})


def date_argument() -> Any:
    """The day that prompts are rendered on; `persona_nnsight.prompts.chat_template`."""
    return argument(
        None,
        DATE_HELP,
        group=MODEL,
        metavar="YYYY-MM-DD",
        shown="today",
    )


def layers_argument(default: str) -> Any:
    """At which layers; `persona_nnsight.method.sites.parse_layers`."""
    return argument(
        default,
        "8, 4-12, 4,8,12, 4-20:4, 25%,40%, or all. The residual at layer L is the input of "
        "decoder layer L.",
        *("--layers", "-l"),
    )


def positions_argument(default: str) -> Any:
    """At which positions; `persona_nnsight.method.sites.parse_positions`."""
    return argument(
        default,
        "p_user_last (end of the user turn), p_last (end of the prompt), g1 to g9 (generated "
        "tokens).",
        *("--positions", "-p"),
    )


def window_argument() -> Any:
    """Tokens per KL."""
    return argument(10, "How many tokens a KL is summed over.")


def margin_argument() -> Any:
    """Which differences of KL do not matter."""
    return argument(
        MARGIN,
        "Differences of KL up to this share of bb's KL (of the host's) count as none.",
    )


def generate_argument() -> Any:
    """Length of the greedy texts that are written beside."""
    return argument(
        0,
        "Also write N tokens of greedy text per condition and site to text.jsonl.",
        group=OUTPUT,
        metavar="N",
    )
