"""Bad input through a process, as a user would give it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import OUT, Outcome, Persona, refused
from spoil import pickled
from tiny import TinyDir


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["capture", "-m", "evil", "-g", "grid.yaml", "-o", OUT],
            "is a pickle, which is never loaded",
        ),
        (["grids", "check", os.fsdecode(b"\xff")], "\\udcff"),
        (["capture", "--window", "ten"], "'--window'"),
        (["report", "nowhere"], "'nowhere' is no run directory"),
    ],
    ids=["pickle", "a path that is no text", "usage", "report"],
)
def test_processes(persona: Persona, tiny_dir: TinyDir, options: list[str], says: str) -> None:
    shutil.copytree(tiny_dir("llama"), "evil")
    pickled("pytorch_model.bin")(Path("evil"))
    done = subprocess.run(
        [sys.executable, "-m", "persona_cli", *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    refused(Outcome(done.returncode, done.stdout, done.stderr), says)
    assert not Path("pwned").exists()
