"""`persona reproduce`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.rule import Rule
from rich.table import Table

from persona_cli import options as o
from persona_cli.console import note_step, notes, output, show_json
from persona_cli.numbers import percent, span
from persona_cli.running import (
    as_records,
    carried_out,
    cost_summary,
    note_interruption,
    prepare,
    show_costs,
    show_files,
    show_findings,
)
from persona_nnsight.errors import PersonaError

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.models.loading import Model
    from persona_nnsight.prompts.grids import Grid
    from persona_nnsight.reproduction.protocol import PaperTable
    from persona_nnsight.reproduction.reproduce import Reproduction

TITLES = {
    "table1": "Table 1: additive substitution, short grid",
    "table2": "Table 2: additive substitution, long grid",
    "table3": "Table 3: markers in 80 tokens, review tasks",
    "table4": "Table 4: injection into the host, review tasks",
}
_MEASURES = {"any": "texts with a marker", "distinct": "distinct markers in a text"}


def reproduce(
    *,
    model: o.ModelOptions,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Only these, with commas between them: table1, table2, table3, table4, figure1.",
            show_default="all",
            rich_help_panel="Cells",
        ),
    ] = None,
    grids: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            "-g",
            metavar="short=FILE|long=FILE",
            help="A grid in place of a built-in one; can be given for each.",
            show_default="the built-in grids",
            rich_help_panel="Cells",
        ),
    ] = None,
    date: o.Date = None,
    where: o.BackendOptions,
    run: o.RunOptions,
) -> None:
    """Make Tables 1 to 4 and Figure 1 of the paper on a model, beside the published figures.

    Tables 1 and 2 are `persona substitute` on the short and the long grid, Table 3 is
    `persona markers` and Table 4 `persona inject` on the long grid's review tasks. The layers are
    the paper's on its three models (google/gemma-2-2b-it, Qwen/Qwen2.5-1.5B-Instruct,
    Qwen/Qwen2.5-3B-Instruct) and as deep on any other. What the tables share is computed once.

    On a model of the paper, which runs in the published dtype unless --dtype names another, the
    difference from its figures is shown; on another one its
    google/gemma-2-2b-it figures stand beside ours for orientation. The texts of the built-in long
    grid are our own; run a file with the paper's stimuli to compare like with like.

    Writes a run directory for each table (table1/ ...), the tables beside the published ones
    (table1.csv ...), run.json, report.html and figures/.

    Example: persona reproduce --only table1,figure1
    """
    from persona_nnsight.report.write import write_report
    from persona_nnsight.reproduction.published import paper_model, published_dtype
    from persona_nnsight.reproduction.reproduce import (
        ReproductionInterrupted,
        carry_out,
        in_passes,
        joint_plan,
        plan_reproduction,
    )

    short, long = _grids(grids or [])
    named = paper_model(model.model)
    if named is not None and model.dtype == "auto":
        dtype = published_dtype(named)
        note_step(f"Running {named} in {dtype}, as published")
        model = replace(model, dtype=dtype)

    def show_plan(skeleton: Model, tables: list[PaperTable]) -> None:
        passes = in_passes(tables)
        if run.as_json and run.dry_run:
            costs = [
                cost_summary(skeleton, joint_plan(found), found[0].grid, model, where)
                for found in passes
            ]
            names = [[table.name for table in found] for found in passes]
            data = [{"tables": t, **cost} for t, cost in zip(names, costs, strict=True)]
            show_json({"command": "reproduce", "passes": data})
            return
        for found in passes:
            title = "; ".join(TITLES[table.name] for table in found)
            (output() if run.dry_run else notes).print(title, style="italic")
            show_costs(skeleton, found[0].grid, joint_plan(found), model, where, run)

    ready = prepare(
        model,
        where,
        run,
        plan=lambda skeleton: plan_reproduction(skeleton, short, long, only, date),
        show_plan=show_plan,
        name="reproduce-{model}",
    )
    if ready is None:
        return
    made, interrupted = carried_out(
        ready,
        run,
        "reproduce",
        work=lambda progress, backend: carry_out(ready.model, ready.studies, progress, backend),
        left=lambda stopped: (
            stopped.reproduction
            if isinstance(stopped, ReproductionInterrupted) and stopped.reproduction.results
            else None
        ),
        save=lambda made: made.save(ready.out, finishes=True),
    )
    note_step("Drawing the figures")
    write_report([ready.out])
    if run.as_json:
        show_json(_summary(made, ready.out))
    else:
        for name, result in made.results.items():
            output().print(Rule(TITLES[name], align="left", style="dim"))
            output().print(show_table(name, made.table(name)))
            show_findings(result)
            output().print()
        show_files(ready.out)
    if interrupted:
        note_interruption()


def _grids(given: list[str]) -> tuple[Grid, Grid]:
    """The short and the long grid."""
    from persona_nnsight.prompts.grids import Grid

    sources = {"short": "short", "long": "long"}
    for text in given:
        name, equals, source = text.partition("=")
        if name not in sources or not equals:
            raise PersonaError(
                f"--grid {text!r} does not say which grid it replaces; write short=FILE or "
                "long=FILE."
            )
        sources[name] = source
    return Grid.load(sources["short"]), Grid.load(sources["long"])


def _summary(made: Reproduction, directory: Path) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "command": "reproduce",
        "model": made.model.weights.model_id,
        "complete": made.complete,
        "out": str(directory),
        "files": sorted(path.name for path in directory.iterdir()),
        "tables": {name: as_records(made.table(name)) for name in made.results},
        "findings": {name: result.findings() for name, result in made.results.items()},
        "seconds": {name: round(value, 3) for name, value in made.seconds.items()},
    }


def show_table(name: str, rows: pd.DataFrame) -> Table:
    """The numbers over all cells that the paper has too, with their controls."""
    over_all = rows[(rows["persona"] == "") & (rows["task"] == "")]
    theirs = str(rows["published_model"].iloc[0]).rpartition("/")[2]
    same = bool(rows["difference"].notna().any())
    about = [
        *([] if same else ["another model"]),
        *([] if rows["same_stimuli"].all() else ["other texts"]),
        str(rows["published_dtype"].iloc[0]),
    ]
    theirs = f"{theirs} ({', '.join(about)})"
    if name in ("table1", "table2"):
        return _by_layer(over_all[over_all["measure"] == "kl"], theirs, same=same)
    return _by_edit(over_all, theirs, markers=name == "table3", same=same)


def _by_layer(rows: pd.DataFrame, theirs: str, *, same: bool) -> Table:
    """A column per layer and a block per position: ours, its controls, and theirs."""
    table = Table(box=None, pad_edge=False)
    for heading in ("position", "median KL, nats"):
        table.add_column(heading)
    layers = list(dict.fromkeys(rows["layers"]))
    for layer in layers:
        table.add_column(f"L{layer}", justify="right")
    for position, at in rows.groupby("position", sort=False):
        # Of a run that was interrupted some are missing.
        cells = {(row["condition"], row["layers"]): row for row in at.to_dict("records")}
        empty = dict.fromkeys(at.select_dtypes("number"), math.nan)
        found = {
            name: [cells.get((name, layer), empty) for layer in layers]
            for name in ("additive", "bb", "by")
        }
        additive = found["additive"]
        table.add_row(str(position), "additive", *(_number(row["value"], 4) for row in additive))
        spans = (span(row["lo"], row["hi"], digits=4) for row in additive)
        table.add_row("", "  95 %", *spans, style="dim")
        table.add_row("", "  recovered", *(percent(row["recovered"]) for row in additive))
        for control in ("bb", "by"):
            values = (_number(row["value"], 4) for row in found[control])
            table.add_row("", f"{control} (control)", *values)
        published = (_published(row, 4, layer=not same) for row in additive)
        table.add_row("", theirs, *published)
        if same:
            table.add_row("", "ours - theirs", *(_number(row["difference"], 4) for row in additive))
        table.add_section()
    return table


def _by_edit(rows: pd.DataFrame, theirs: str, *, markers: bool, same: bool) -> Table:
    """A row per edit: ours, and theirs."""
    table = Table(box=None, pad_edge=False)
    for heading in (*(["measure"] if markers else []), "written", "layers"):
        table.add_column(heading)
    for heading in ("ours", "95 %", *([] if markers else ["gap closed"])):
        table.add_column(heading, justify="right")
    table.add_column(theirs, justify="right")
    if same:
        table.add_column("ours - theirs", justify="right")
    for row in rows[rows["measure"].isin(("kl", "any", "distinct"))].to_dict("records"):
        digits = {"any": 0, "distinct": 2}.get(row["measure"], 3)
        cells = [
            *([_MEASURES[row["measure"]]] if markers else []),
            row["condition"],
            row["layers"],
            _number(row["value"], digits),
            span(row["lo"], row["hi"], digits=digits),
            *([] if markers else [percent(row["gap_closed"])]),
            _published(row, digits, layer=not same and row["layers"] not in ("", "none")),
        ]
        if same:
            cells.append(_number(row["difference"], digits))
        table.add_row(*cells)
    return table


def _published(row: Mapping[Any, Any], digits: int, *, layer: bool) -> str:
    """A published number, with its layer where it is not ours."""
    text = _number(row["published"], digits)
    return f"{text} (L{row['published_layers']})" if text and layer else text


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}" if math.isfinite(value) else ""
