"""What README.md and the pages in docs/ are generated from: real commands, each run once.

The blocks of a page call these functions through cog (``make docs``); each returns Markdown.
``test_docs.py`` runs the same blocks in memory and compares.

Every line runs in a new directory that holds `FILES` and what the lines that it names as `after`
left, so that a page says the same alone as after the others, and a run that several pages show is
made once.
"""

from __future__ import annotations

import atexit
import io
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from fake_ndif import FakeNdif
from persona_cli.commands import reproduce
from rich.console import Console
from rooms import MAY_IMPORT

from persona_nnsight.analysis.columns import COLUMNS, read_table
from persona_nnsight.experiments.registry import experiment_named

PROJECT = Path(__file__).parents[2]

#: The run that is committed, made by ``persona reproduce --out outputs/example``.
EXAMPLE_RUN = PROJECT / "outputs" / "example"

#: Lines that several blocks name.
FIRST_RUN = (
    "persona substitute --grid short --layers 55% --positions p_last "
    "--conditions additive,bb,by,other_x"
)
SHORT_RUN = "persona substitute --grid short"
CAPTURE = "persona capture --personas yoda --tasks haiku,policy --layers 8,21"
INJECT = "persona inject --layers 8-20:4 --each"
STEER = "persona steer --layers 16 --alpha 0:2:0.5 --save-vectors short.safetensors"

GRID = """\
name: kitchen
personas:
  chef: {text: a chef of fifteen years, markers: [simmer, mise en place]}
  chemist: a food chemist
tasks:
  egg: Explain how to boil an egg.
  menu: Plan a dinner for four.
"""

LATER = """\
name: later
personas: {yoda: Yoda, marx: Karl Marx}
tasks:
  egg: Explain how to boil an egg.
  bike: Explain how to ride a bicycle.
  rain: Describe a rainy afternoon.
"""

SCRIPT = """\
PERSONAS = {
    "chef": "a chef of fifteen years",
    "chemist": "a food chemist",
}
TASKS = {"egg": "Explain how to boil an egg."}
BASE_TASK = "Give some advice."
"""

#: The files of a user, in every directory.
FILES = {"kitchen.yaml": GRID, "later.yaml": LATER, "study.py": SCRIPT}

TEN_LINES = """\
from persona_nnsight import Grid, load_model, substitute

model = load_model("smollm2-135m")
grid = Grid.load("short").select(personas=["yoda"])
result = substitute(model, grid, layers="55%", positions="p_last", conditions=["additive", "bb"])

print(result.frame()[["persona", "task", "condition", "kl"]].head(4).round(3))
print(result.summary()[["condition", "median", "recovered", "n"]].round(3))
for sentence in result.findings():
    print(sentence)
"""

EXAMPLE = """\
from persona_nnsight import Grid, capture, inject, load_model, substitute

model = load_model("smollm2-135m")
grid = Grid.load("short").select(personas=["yoda"], tasks=["haiku", "policy"])

found = capture(model, grid, layers="8,21", positions="p_last")
print({key: tuple(h.shape) for key, h in found.residuals.items()})
print(found.frame()[["task", "layer", "cos_xy_sum", "inter_over_xy"]].round(3))

kl = substitute(model, grid, layers=[21], positions="p_last", conditions=["additive", "bb", "by"])
print(kl.summary()[["condition", "median", "recovered", "n"]].round(3))

gap = inject(model, grid, layers=[16, 20])
print(gap.frame()[["task", "condition", "layers", "kl", "gap_closed"]].round(3))

print(kl.save("outputs/yoda"))
"""

READ = """\
import json
import pandas as pd
from safetensors.numpy import load_file

run = "outputs/capture-smollm2-135m-short-1"
h = load_file(f"{run}/residuals.safetensors")
print({key: (value.shape, value.dtype.name) for key, value in sorted(h.items())})
print(list(pd.read_csv(f"{run}/geometry.csv")))

run = "outputs/substitute-smollm2-135m-short-1"
print(list(pd.read_csv(f"{run}/kl.csv")))
print(list(pd.read_csv(f"{run}/summary.csv")))
print(list(json.load(open(f"{run}/run.json"))))
"""


@cache
def workspace() -> Path:
    """Where all directories are, removed when Python ends."""
    directory = tempfile.TemporaryDirectory(prefix="persona-docs-")
    atexit.register(directory.cleanup)
    return Path(directory.name)


class Ran(NamedTuple):
    """A line that has run: what it printed, and the directory that it ran in."""

    stdout: str
    directory: Path


def new_directory(*after: str) -> Path:
    """A directory with `FILES` and what lines left in theirs."""
    directory = Path(tempfile.mkdtemp(dir=workspace()))
    for name, text in FILES.items():
        (directory / name).write_text(text, encoding="utf-8")
    for line in after:
        shutil.copytree(ran(line).directory, directory, dirs_exist_ok=True)
    return directory


def environment(**more: str) -> dict[str, str]:
    """Variables with which a command prints the same on every terminal and without a GPU."""
    forced = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH")
    private = ("NDIF_API_KEY", "NDIF_HOST")
    kept = {name: value for name, value in os.environ.items() if name not in forced + private}
    return kept | {
        "COLUMNS": "96",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        **more,
    }


def output_of(arguments: list[str], directory: Path, **more: str) -> str:
    """Standard output of a command."""
    done = subprocess.run(
        arguments, cwd=directory, env=environment(**more), capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()) + "\n"


def arguments_of(line: str) -> list[str]:
    """The program of this environment and its arguments, from a ``persona …`` line."""
    program, *arguments = shlex.split(line)
    assert program == "persona"
    script = shutil.which(program, path=Path(sys.executable).parent)
    assert script, f"no `persona` beside {sys.executable}; install the package there"
    return [script, *arguments]


@cache
def ran(line: str, *after: str) -> Ran:
    """A ``persona …`` line, run in a directory with what other lines left."""
    directory = new_directory(*after)
    return Ran(output_of(arguments_of(line), directory), directory)


def fenced(text: str, language: str = "") -> str:
    """A code block."""
    return f"```{language}\n{text}```\n"


def command(line: str, *after: str) -> str:
    """A ``persona …`` line with what it prints."""
    return fenced(f"$ {line}\n{ran(line, *after).stdout}", "console")


def help_text(*name: str) -> str:
    """The help of a command, or of the whole."""
    line = " ".join(["persona", *name, "--help"])
    return fenced(f"$ {line}\n" + ran(line).stdout.lstrip("\n"), "console")


def models() -> str:
    """``persona models`` on a machine with nothing but the embedded model, in the usual place."""
    from persona_nnsight.models.weights.resolve import resolve

    ready = Path(resolve("smollm2-135m", fetch=False).path)
    directory = new_directory()
    (directory / "cache" / "models").mkdir(parents=True)
    (directory / "cache" / "models" / ready.name).symlink_to(ready, target_is_directory=True)
    line = "persona models"
    found = output_of(arguments_of(line), directory, PERSONA_CACHE="cache", HF_HOME="hub")
    return fenced(
        f"$ {line}\n" + found.replace("cache/models", "~/.cache/persona-nnsight/models"), "console"
    )


def resumed(line: str, out: str) -> str:
    """A line that is killed when the first of its parts is on disk, and `out` gone on with."""
    directory = new_directory()
    with subprocess.Popen(
        arguments_of(line),
        cwd=directory,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not any((directory / out).glob("parts/*")):
            time.sleep(0.02)
        process.kill()
    again = f"persona resume {out}"
    found = output_of(arguments_of(again), directory).replace(f"{directory.resolve()}/", "~/study/")
    return fenced(f"$ {line}\nKilled\n$ {again}\n{found}", "console")


#: Where `make ndif-server` listens.
SERVER = "http://127.0.0.1:8001"

RUNNING = (("RUNNING", "Your job has started running."),)
QUEUED = (("QUEUED", "Your job is first in the queue."),)


def on_server(*lines: str) -> str:
    """Lines with what they print, the server of the tests in the place of `SERVER`.

    What differs between two runs, which is time and size, is shown as it once was.
    """
    directory, shown = new_directory(), []
    with FakeNdif(scripts=[RUNNING, QUEUED, QUEUED]) as server:
        for line in lines:
            found = output_of(arguments_of(line.replace(SERVER, server.url)), directory)
            found = found.replace(server.url, SERVER)
            found = re.sub(r"\d\d \w{3} \d\d:\d\d:\d\d", "23 May 12:00:00", found)
            shown.append(f"$ {line}\n" + re.sub(r"\d\d kB", "46 kB", versions(found)))
    return fenced("".join(shown), "console")


def versions(found: str) -> str:
    """What ``persona doctor`` prints, on the tested Python and with any build of torch."""
    own = platform.python_version()
    return re.sub(r"(\d\.\d+\.\d+)(?:\+\w+)", r"\1", found.replace(own, "3.11.7"))


def doctor() -> str:
    """``persona doctor``."""
    line = "persona doctor"
    return fenced(f"$ {line}\n{versions(ran(line).stdout)}", "console")


def file(name: str) -> str:
    """One of `FILES`."""
    return fenced(FILES[name], {".yaml": "yaml", ".py": "python"}[Path(name).suffix])


def python(code: str, *after: str) -> str:
    """A piece of Python and what it prints."""
    found = output_of([sys.executable, "-c", code], new_directory(*after))
    return fenced(code, "python") + "\n" + fenced(found, "text")


def short_run() -> Path:
    """The run directory of `SHORT_RUN`."""
    return ran(SHORT_RUN).directory / "outputs" / "substitute-smollm2-135m-short-1"


def results(run: Path) -> pd.DataFrame:
    """KL by (persona, task, position, layers), a column per condition."""
    table = pd.read_csv(run / "kl.csv", dtype={"layers": str})
    return table.set_index(["persona", "task", "position", "layers", "condition"])["kl"].unstack()


def comparison() -> str:
    """In how many cells of `SHORT_RUN` the additive vector costs less than a control.

    Not at the first layer, where some cells differ by no more than rounding on another CPU.
    """
    table = results(short_run())
    layers = sorted(table.index.unique("layers"), key=int)[1:]
    head = ["position", "additive below", *(f"L{layer}" for layer in layers)]
    lines = [head, ["---", "---", *("--:" for _ in layers)]]
    for position in ("p_last", "g1", "g2"):
        for control in ("by", "other_x"):
            lower = (table["additive"] < table[control]).groupby(["position", "layers"]).sum()
            counts = [str(lower[position, layer]) for layer in layers]
            lines.append([position, f"`{control}`", *counts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def reading() -> str:
    """The paragraphs that interpret `SHORT_RUN`, with its numbers; fails if they do not hold."""
    table = results(short_run())
    medians = table.groupby(["position", "layers"]).median()
    assert medians["clean"].abs().max() < 1e-4
    assert (medians["random"] > medians["bb"]).all()
    at_p_last = medians.loc["p_last"]
    assert (at_p_last["by"] > at_p_last["additive"]).all()

    def m(condition: str, position: str, layer: int) -> str:
        return f"{float(medians[condition][position, str(layer)]):.3f}"

    return paragraphs(
        f"""
        - **`bb`** is what there is to lose. At `p_last`, layer 8, writing neither persona nor task
        costs {m("bb", "p_last", 8)} nats. The {m("additive", "p_last", 8)} of the additive vector
        is small there because almost everything is. At layer 26 `bb` costs
        {m("bb", "p_last", 26)} and the additive vector {m("additive", "p_last", 26)}. `recovered`
        puts the two in one number.

        - **`by`** holds the task and the baseline persona; **`xb`** holds the persona and the
        baseline task. At `p_last`, layer 16, leaving out the persona costs {m("by", "p_last", 16)},
        leaving out the task {m("xb", "p_last", 16)}, and leaving out both {m("bb", "p_last", 16)}.
        There, a vector without the persona in it already recovers most of what `bb` loses.

        - **`other_x`** is the additive vector with another persona's Δ_X. If it costs no more than
        `additive`, the run does not show that the persona's own effect was written.

        - **`random`** is h_BB plus a random vector as long as Δ_XY. Its median is above that of
        `bb` at every site of this run.

        - **`clean`** writes h_XY back. Its KL is the numerical floor: around 0, of either sign.
        """
    )


def injection() -> str:
    """The paragraph that interprets `INJECT`."""
    run = ran(INJECT).directory / "outputs" / "inject-smollm2-135m-short-1"
    summary = pd.read_csv(run / "summary.csv", dtype={"layers": str}).set_index(
        ["condition", "layers"]
    )
    closed = summary["gap_closed"]
    assert closed.drop(["host", "clean"], level="condition").between(-0.05, 0.2).all()
    alone = [layers for layers in closed["oracle"].index if "+" not in layers]
    best = max(alone, key=lambda layers: float(closed["oracle", layers]))
    together = next(layers for layers in closed["oracle"].index if "+" in layers)
    return paragraphs(
        f"""
        This injection is a negative result. Even the oracle, which writes the true residual
        of the prompt that names the persona, closes {100 * closed["oracle", best]:.0f} % of the gap
        at the best single layer ({best}), and {100 * closed["oracle", together]:.0f} % when
        {together} are written together. A likely reason: the residual of one token is replaced,
        while the tokens after it go on attending to a prompt that names no persona.
        """
    )


def norm() -> str:
    """What the layer's input norm does to the interaction, on the short grid of the example."""
    table = read_table(EXAMPLE_RUN / "table1" / "geometry.csv")
    sentences = experiment_named("capture").findings({"geometry": table})
    return paragraphs("In the example run, on the short grid: " + " ".join(sentences))


def reproduction() -> str:
    """Tables 2 and 4 of the example run, as the command shows them, with its findings."""
    text = io.StringIO()
    console = Console(file=text, width=100, color_system=None)
    for name, command in (("table2", "substitute"), ("table4", "inject")):
        console.print(reproduce.TITLES[name])
        console.print(reproduce.show_table(name, read_table(EXAMPLE_RUN / f"{name}.csv")))
        run = EXAMPLE_RUN / name
        tables = {kind: read_table(run / f"{kind}.csv") for kind in ("summary", "contrasts")}
        for sentence in experiment_named(command).findings(tables):
            console.print(f"\n{sentence}", highlight=False)
        console.print()
    lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
    return fenced("\n".join(lines) + "\n", "text")


def columns() -> str:
    """The columns of all tables."""
    lines = ["| column | type | meaning |", "| --- | --- | --- |"]
    for column in COLUMNS:
        meaning = (
            f"{column.meaning}; with `…_lo`, `…_hi`" if column.has_interval else column.meaning
        )
        lines.append(f"| `{column.name}` | {column.type} | {meaning} |")
    return "\n".join(lines) + "\n"


def rooms() -> str:
    """The rooms, bottom up: what each holds, and from which it takes."""
    lines = ["| room | holds | takes from |", "| --- | --- | --- |"]
    for name, below in MAY_IMPORT.items():
        about = (import_module(f"persona_nnsight.{name}").__doc__ or "").splitlines()[0]
        taken = ", ".join(f"`{other}`" for other in MAY_IMPORT if other in below)
        lines.append(f"| `{name}` | {about} | {taken} |")
    return "\n".join(lines) + "\n"


def paragraphs(text: str) -> str:
    """Text with lines of equal length; blank lines part paragraphs, and list items stand close."""
    found = []
    for paragraph in text.strip().split("\n\n"):
        indent = "  " if paragraph.strip().startswith("- ") else ""
        words = " ".join(paragraph.split())
        found.append(
            textwrap.fill(
                words, 100, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
            )
        )
    return "\n".join(found) + "\n"
