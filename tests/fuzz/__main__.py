"""Coverage-guided fuzzing of the checks: `make fuzz SECONDS=600`.

Every target runs in a process of its own for its share of the time. What libFuzzer finds (another
exception than PersonaError, an input that takes 20 s or 4 GB) ends with its stack and the input.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
os.environ["HF_HUB_OFFLINE"] = "1"

import atheris

with atheris.instrument_imports(include=["persona_nnsight", "persona_cli", "yaml"]):
    from fuzz import checks
    from fuzz.damage import ODD_WORDS
    from fuzz.samples import GRID, PENDING, SCRIPT, run_files

Target = Callable[[bytes], None]

#: An input names the file of the run that it takes the place of by its first line.
_LINE = b"\n"


def of_text(check: Callable[[str], None]) -> Target:
    return lambda raw: check(raw.decode("utf-8", "replace"))


def of_layers(raw: bytes) -> None:
    n_layers = 1 + (raw[0] % 60 if raw else 0)
    text = raw[1:].decode("utf-8", "replace")
    checks.check_layers(text, n_layers)
    checks.check_layer_sets(text, n_layers)


def of_markers(raw: bytes) -> None:
    text, *markers = raw.decode("utf-8", "replace").split("\n")
    checks.check_markers(text, list(dict.fromkeys(markers[:6])))


def of_run(files: dict[str, bytes]) -> Target:
    def check(raw: bytes) -> None:
        name, _, content = raw.partition(_LINE)
        known = name.decode("utf-8", "replace")
        checks.check_run({**files, known if known in files else "run.json": content})

    return check


def targets(samples: dict[str, dict[str, bytes]]) -> dict[str, tuple[Target, list[bytes]]]:
    """What is fuzzed, by name, and the inputs it begins with."""
    found: dict[str, tuple[Target, list[bytes]]] = {
        "layers": (of_layers, [b"\x1a4-20:4,25%", b"\x0514; 1-3:2", b" all"]),
        "positions": (of_text(checks.check_positions), [b"p_last,g1,p_user_last"]),
        "conditions": (of_text(checks.check_conditions), [b"additive,other_x"]),
        "targets": (of_text(checks.check_targets), [b"table1,figure1"]),
        "factors": (of_text(checks.check_factors), [b"0:2:0.5,1,-3e2"]),
        "budget": (of_text(checks.check_budget), [b"8GB", b"0.5 mb"]),
        "device": (of_text(checks.check_device), [b"cuda:1", b"balanced", b"cpu"]),
        "model": (of_text(checks.check_model_spec), [b"google/gemma-2-2b-it", b"~/a.gguf"]),
        "markers": (of_markers, ["the Force of a-b İ\nforce\na-b\ni".encode()]),
        "grid": (checks.check_grid, [GRID.to_yaml().encode()]),
        "script": (checks.check_script, [SCRIPT]),
        "vectors": (checks.check_vectors, list(samples["vectors"].values())),
        "jobs": (checks.check_ledger, [PENDING]),
    }
    for command in ("capture", "steer", "markers"):
        files = {name: raw for name, raw in samples[command].items() if "tensors" not in name}
        seeds = [name.encode() + _LINE + raw for name, raw in files.items()]
        found[f"run of {command}"] = of_run(files), seeds
    return found


def fuzz(name: str, seconds: int, samples: dict[str, dict[str, bytes]], directory: Path) -> None:
    """Run libFuzzer on one target; it ends the process."""
    target, seeds = targets(samples)[name]
    corpus = directory / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    words = {word.encode() for word in ODD_WORDS if 0 < len(word.encode()) < 60}
    written = ("".join(f"\\x{byte:02x}" for byte in word) for word in sorted(words))
    (directory / "words").write_text("".join(f'"{word}"\n' for word in written))
    options = {
        "max_total_time": seconds,
        "timeout": 20,
        "rss_limit_mb": 4096,
        "max_len": max(2000, *(2 * len(seed) for seed in seeds)),
        "dict": directory / "words",
        "artifact_prefix": f"{Path.cwd()}/fuzz-{name.replace(' ', '-')}-",
        "verbosity": 0,
        "print_final_stats": 1,
    }
    atheris.Setup([sys.argv[0], *(f"-{k}={v}" for k, v in options.items()), str(corpus)], target)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=int, help="in all")
    parser.add_argument("--target", help="this one alone")
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with TemporaryDirectory() as root:
        if options.samples is not None:
            samples = json.loads(options.samples.read_text())
            restored = {
                command: {name: bytes.fromhex(raw) for name, raw in files.items()}
                for command, files in samples.items()
            }
            fuzz(options.target, options.seconds, restored, Path(root))
        found = run_files()
        path = Path(root, "samples.json")
        path.write_text(
            json.dumps({c: {n: raw.hex() for n, raw in f.items()} for c, f in found.items()})
        )
        names = [options.target] if options.target else list(targets(found))
        failed = [name for name in names if not _run(name, options.seconds // len(names), path)]
    sys.exit(f"found something: {', '.join(failed)}" if failed else 0)


def _run(name: str, seconds: int, samples: Path) -> bool:
    """Fuzz one target in a process of its own; whether nothing was found."""
    command = [sys.executable, __file__, str(max(1, seconds)), "--target", name]
    done = subprocess.run(
        [*command, "--samples", str(samples)], capture_output=True, text=True, errors="replace"
    )
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    print(f"{name}: {runs[1] if runs else '?'} inputs in {seconds} s", flush=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-6000:], flush=True)
    return not done.returncode


if __name__ == "__main__":
    main()
