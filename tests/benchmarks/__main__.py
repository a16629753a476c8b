"""`python tests/benchmarks`: the directory above has to be where modules are looked for."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.command import main  # noqa: E402

main()
