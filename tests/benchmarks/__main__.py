"""`python tests/benchmarks`: the directory above has to be where modules are looked for."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS / "support")]

from benchmarks.command import main  # noqa: E402

main()
