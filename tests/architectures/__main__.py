"""`python tests/architectures`: the directory above has to be where modules are looked for."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads it then

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS / "support")]

from architectures.command import main  # noqa: E402

main()
