"""What README.md is generated from: real commands, run in one temporary directory.

The blocks of README.md call these functions through cog (``make readme``); each returns Markdown.
``test_readme.py`` runs the same blocks in memory and compares.
"""

from __future__ import annotations

import atexit
import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from functools import cache
from pathlib import Path

import pandas as pd
from persona_cli.commands import reproduce
from rich.console import Console

from persona_nnsight.analysis.columns import read_table
from persona_nnsight.analysis.findings import findings

PROJECT = Path(__file__).parents[2]

#: The run that is committed, made by ``persona reproduce --out outputs/example``.
EXAMPLE_RUN = PROJECT / "outputs" / "example"

SHORT_RUN = "persona substitute --grid short"

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

h = load_file("outputs/capture-smollm2-135m-short-1/residuals.safetensors")
print({key: (value.shape, value.dtype.name) for key, value in sorted(h.items())})
print(list(pd.read_csv("outputs/capture-smollm2-135m-short-1/geometry.csv")))

run = "outputs/substitute-smollm2-135m-short-1"
print(list(pd.read_csv(f"{run}/kl.csv")))
print(list(pd.read_csv(f"{run}/summary.csv")))
print(list(json.load(open(f"{run}/run.json"))))
"""


@cache
def workspace() -> Path:
    """The directory that everything runs in, removed when Python ends."""
    directory = tempfile.TemporaryDirectory(prefix="persona-readme-")
    atexit.register(directory.cleanup)
    return Path(directory.name)


def output_of(arguments: list[str], **more: str) -> str:
    """Standard output of a command, the same on every terminal and without a GPU."""
    forced = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH")
    environment = {name: value for name, value in os.environ.items() if name not in forced}
    environment |= {
        "COLUMNS": "96",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        **more,
    }
    done = subprocess.run(
        arguments, cwd=workspace(), env=environment, capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()) + "\n"


def fenced(text: str, language: str = "") -> str:
    """A code block."""
    return f"```{language}\n{text}```\n"


@cache
def stdout(line: str, **more: str) -> str:
    """Standard output of a ``persona …`` line; every line runs once."""
    program, *arguments = shlex.split(line)
    assert program == "persona"
    script = shutil.which(program, path=Path(sys.executable).parent)
    assert script, f"no `persona` beside {sys.executable}; install the package there"
    return output_of([script, *arguments], **more)


def command(line: str) -> str:
    """A ``persona …`` line with what it prints."""
    return fenced(f"$ {line}\n{stdout(line)}", "console")


def help_text(name: str) -> str:
    """The help of a command, folded away."""
    summary = f"<summary><code>persona {name} --help</code></summary>"
    text = stdout(f"persona {name} --help").lstrip("\n")
    return f"<details>\n{summary}\n\n{fenced(text, 'text')}\n</details>\n"


def models() -> str:
    """``persona models`` on a machine with nothing but the embedded model, in the usual place."""
    from persona_nnsight.models.weights.resolve import resolve

    ready = Path(resolve("smollm2-135m", fetch=False).path)
    (workspace() / "cache" / "models").mkdir(parents=True)
    (workspace() / "cache" / "models" / ready.name).symlink_to(ready, target_is_directory=True)
    found = stdout("persona models", PERSONA_CACHE="cache", HF_HOME="hub")
    return fenced(
        "$ persona models\n" + found.replace("cache/models", "~/.cache/persona-nnsight/models"),
        "console",
    )


def file(name: str, text: str, language: str) -> str:
    """A file that later commands read, shown as it is."""
    (workspace() / name).write_text(text, encoding="utf-8")
    return fenced(text, language)


def python(code: str) -> str:
    """A piece of Python and what it prints."""
    return fenced(code, "python") + "\n" + fenced(output_of([sys.executable, "-c", code]), "text")


def short_run() -> Path:
    """The run directory of `SHORT_RUN`."""
    stdout(SHORT_RUN)
    return workspace() / "outputs" / "substitute-smollm2-135m-short-1"


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
    """The paragraph that interprets the injection of the README."""
    summary = pd.read_csv(
        workspace() / "outputs" / "inject-smollm2-135m-short-1" / "summary.csv",
        dtype={"layers": str},
    ).set_index(["condition", "layers"])
    closed = summary["gap_closed"]
    assert closed.drop("host", level="condition").between(-0.05, 0.2).all()
    alone = [layers for layers in closed["oracle"].index if "+" not in layers]
    best = max(alone, key=lambda layers: float(closed["oracle", layers]))
    together = next(layers for layers in closed["oracle"].index if "+" in layers)
    return paragraphs(
        f"""
        The injection above is a negative result. Even the oracle, which writes the true residual
        of the prompt that names the persona, closes {100 * closed["oracle", best]:.0f} % of the gap
        at the best single layer ({best}), and {100 * closed["oracle", together]:.0f} % when
        {together} are written together. A likely reason: the residual of one token is replaced,
        while the tokens after it go on attending to a prompt that names no persona.
        """
    )


def norm() -> str:
    """What the layer's input norm does to the interaction, on the short grid of the example."""
    table = read_table(EXAMPLE_RUN / "table1" / "geometry.csv")
    sentences = findings("capture", {"geometry": table})
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
        for sentence in findings(command, tables):
            console.print(f"\n{sentence}", highlight=False)
        console.print()
    lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
    return fenced("\n".join(lines) + "\n", "text")


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
