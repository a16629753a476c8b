"""One command in a process forked from a server that has everything imported.

A module of its own, because such a process imports the module of what it is to do.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *(
            "persona_cli.app",
            "persona_nnsight.experiments.execution",
            "persona_nnsight.storage.kept_events",
        ),
        *(f"persona_nnsight.experiments.{name}" for name in ("capture", "inject", "substitute")),
        *("nnsight.modeling.transformers", "transformers.models.llama.modeling_llama"),
        *("transformers.models.auto.modeling_auto", "transformers.pipelines.text_generation"),
    ]
)


def start(arguments: Sequence[object], interval: float) -> ForkServerProcess:
    """Start `persona ARGUMENTS` here; its words go to the file ``words``.

    Args:
        arguments: of the command.
        interval: seconds between two parts of its journal.
    """
    process = _context.Process(
        target=_persona, args=(os.getcwd(), [str(a) for a in arguments], interval)
    )
    process.start()
    return process


def _persona(directory: str, arguments: Sequence[str], interval: float) -> None:
    from persona_cli.app import main

    from persona_nnsight.storage import kept_events

    os.chdir(directory)
    words = os.open("words", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    kept_events._INTERVAL = interval
    sys.argv = ["persona", *arguments]
    main(list(arguments))
