"""The options that several commands share, and the groups they come in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.arguments import DATE_HELP, MODEL, OUTPUT
from persona_nnsight.models.weights.embedded import ALIAS

if TYPE_CHECKING:
    from persona_nnsight.prompts.grids import Grid

DEFAULT_MODEL = ALIAS

_CELLS = "Cells"
_WHERE = "Where it runs"

ModelSpec = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A hub id (google/gemma-2-2b-it, Qwen/Qwen2.5-1.5B-Instruct, ...), a model "
        "directory, a .gguf file, or the embedded smollm2-135m.",
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        help="Branch, tag or commit of a hub model.", show_default="main", rich_help_panel=MODEL
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: bfloat16 on a GPU, float32 on a CPU.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto (the best single device), cpu, cuda, cuda:1, mps, or balanced (over all GPUs).",
        rich_help_panel=MODEL,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attn",
        help="Attention implementation: eager, sdpa, flash_attention_2.",
        show_default="the model's own",
        rich_help_panel=MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the checkpoint, with all your rights on this "
        "machine; pin it by --revision and a commit.",
        rich_help_panel=MODEL,
    ),
]
Decoding = Annotated[
    str,
    typer.Option(
        metavar="greedy|checkpoint",
        help="The largest logit, or the largest after what the checkpoint's generation settings "
        "do to logits (penalties, suppressed tokens).",
        rich_help_panel=MODEL,
    ),
]
RunPath = Annotated[
    str,
    typer.Option(
        metavar="auto|fast|whole",
        help="How rows run: with shared openings and padded batches, whole from their first "
        "token, or as two prompts of the run show that the model allows.",
        rich_help_panel=MODEL,
    ),
]
Date = Annotated[
    str | None,
    typer.Option(help=DATE_HELP, metavar="YYYY-MM-DD", show_default="today", rich_help_panel=MODEL),
]
GridSource = Annotated[
    str | None,
    typer.Option(
        "--grid",
        "-g",
        metavar="NAME|FILE",
        help="A built-in grid (short, long) or a YAML file; see `persona grids`.",
        show_default="short",
        rich_help_panel=_CELLS,
    ),
]
Personas = Annotated[
    str | None,
    typer.Option(
        metavar="KEYS",
        help="Only these personas of the grid, with commas between them.",
        show_default="all",
        rich_help_panel=_CELLS,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="KEYS",
        help="Only these tasks of the grid.",
        show_default="all",
        rich_help_panel=_CELLS,
    ),
]
PersonaText = Annotated[
    str | None,
    typer.Option(
        "--persona",
        metavar="TEXT",
        help="One cell instead of a grid: the persona, as in 'As TEXT, ...'.",
        show_default=False,
        rich_help_panel=_CELLS,
    ),
]
TaskText = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TEXT",
        help="One cell instead of a grid: the task.",
        show_default=False,
        rich_help_panel=_CELLS,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Where the run goes; a directory that holds something is refused.",
        show_default="outputs/COMMAND-MODEL-GRID-N",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="A machine-readable summary on standard output, and nothing else there.",
        rich_help_panel=OUTPUT,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the plan (cells, tokens, forward passes, memory) without loading weights.",
        rich_help_panel=OUTPUT,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Also show the plan, the timings and the libraries' own messages.",
        rich_help_panel=OUTPUT,
    ),
]


BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="local (this machine), ndif (a server that has the model), or simulate (a rehearsal "
        "of ndif on this machine).",
        rich_help_panel=_WHERE,
    ),
]
Remote = Annotated[
    bool,
    typer.Option("--remote", help="Short for --backend ndif.", rich_help_panel=_WHERE),
]
NdifHost = Annotated[
    str | None,
    typer.Option(
        "--ndif-host",
        metavar="URL",
        help="The NDIF server. The API key comes from NDIF_API_KEY or nnsight's configuration.",
        show_default="nnsight's configuration",
        rich_help_panel=_WHERE,
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Allow plain http to another machine, where the way there can read and change all.",
        rich_help_panel=_WHERE,
    ),
]
Detach = Annotated[
    bool,
    typer.Option(
        "--detach/--no-detach",
        help="Send the jobs and do not wait: `persona resume` collects them.",
        show_default=False,
        rich_help_panel=_WHERE,
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that the run may take beside the weights, such as 8GB or 500MB.",
        show_default="half of what is free",
        rich_help_panel=_WHERE,
    ),
]
#: Set by `persona resume`, which runs a command again in the directory that holds its jobs.
Resume = Annotated[Path | None, typer.Option("--resume", hidden=True)]

BACKENDS = ("local", "simulate", "ndif")


@dataclass(frozen=True)
class BackendOptions:
    """Where the work is done."""

    backend: BackendName = "local"
    remote: Remote = False
    ndif_host: NdifHost = None
    insecure: Insecure = False
    detach: Detach = False
    memory_budget: MemoryBudget = None
    resume: Resume = None

    @property
    def name(self) -> str:
        """``local``, ``simulate`` or ``ndif``.

        Raises:
            PersonaError: an unknown name, or options of a server without one.
        """
        if self.backend not in BACKENDS:
            raise PersonaError(
                f"Backend {self.backend!r} does not exist; use {', '.join(BACKENDS)}."
            )
        if self.remote and self.backend == "simulate":
            raise PersonaError(
                "--remote means --backend ndif and cannot go with --backend simulate."
            )
        chosen = "ndif" if self.remote else self.backend
        given = {
            "--ndif-host": self.ndif_host is not None,
            "--insecure": self.insecure,
            "--detach": self.detach,
        }
        for option, there in given.items():
            if there and chosen != "ndif":
                raise PersonaError(
                    f"{option} is for a server; add --backend ndif, or leave it out."
                )
        return chosen

    def memory_bytes(self) -> int | None:
        """The memory budget; None where none is given.

        Raises:
            PersonaError: no size, or one for jobs, which see to their own memory.
        """
        if self.memory_budget is None:
            return None
        if self.name != "local":
            raise PersonaError(
                f"--memory-budget is for --backend local, and jobs of --backend {self.name} see to "
                "their own memory; leave it out."
            )
        text = self.memory_budget.strip()
        size = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([MG])B", text, re.IGNORECASE)
        unit = {"m": 10**6, "g": 10**9}
        found = 0 if size is None else int(float(size[1]) * unit[size[2].lower()])
        if not found:
            raise PersonaError(
                f"Memory budget {self.memory_budget!r} is not a size; use a number with MB or GB, "
                "such as 500MB or 8GB."
            )
        return found


@dataclass(frozen=True)
class ModelOptions:
    """What to load."""

    model: ModelSpec = DEFAULT_MODEL
    revision: Revision = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    attn: Attention = None
    trust_remote_code: TrustRemoteCode = False
    decoding: Decoding = "greedy"
    path: RunPath = "auto"

    def arguments(self) -> dict[str, Any]:
        """The arguments of `persona_nnsight.load_model`."""
        return {
            "spec": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "device": self.device,
            "attn": self.attn,
            "trust_remote_code": self.trust_remote_code,
            "decoding": self.decoding,
            "path": self.path,
        }


@dataclass(frozen=True)
class CellOptions:
    """Which cells."""

    grid: GridSource = None
    personas: Personas = None
    tasks: Tasks = None
    persona: PersonaText = None
    task: TaskText = None

    def choose(self, default: str = "short") -> Grid:
        """The grid that the options name, or `default`.

        Raises:
            PersonaError: options that contradict each other, or an unknown grid or key.
        """
        from persona_nnsight.prompts.grids import Grid

        if self.persona is not None or self.task is not None:
            if self.persona is None or self.task is None:
                one = ("--persona", "--task")
                given, other = one if self.task is None else reversed(one)
                raise PersonaError(f"{given} asks for one cell, which also needs {other} TEXT.")
            if (self.grid, self.personas, self.tasks) != (None, None, None):
                raise PersonaError(
                    "--persona and --task name one cell and cannot go with --grid, --personas or "
                    "--tasks; use one or the other."
                )
            return Grid.single(self.persona, self.task)
        loaded = Grid.load(default if self.grid is None else self.grid)
        return loaded.select(names(self.personas), names(self.tasks))


@dataclass(frozen=True)
class LongCellOptions(CellOptions):
    """Which cells, of the long grid when no other is named."""

    grid: Annotated[
        str | None,
        typer.Option(
            "--grid",
            "-g",
            metavar="NAME|FILE",
            help="A built-in grid with markers (long) or a YAML file; see `persona grids`.",
            show_default="long",
            rich_help_panel=_CELLS,
        ),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """Where a run goes and what is shown of it."""

    out: Out = None
    as_json: Json = False
    dry_run: DryRun = False
    verbose: Verbose = False


def names(text: str | None) -> list[str] | None:
    """Keys with commas between them; None where nothing is given."""
    return None if text is None else [key.strip() for key in text.split(",")]
