"""What an experiment returns: tables, tensors, texts, and everything needed to say where from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from persona_nnsight.manifest import run_manifest
from persona_nnsight.runs import save_run
from persona_nnsight.tables import geometry_summary, geometry_table, kl_summary, kl_table

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from persona_nnsight.costs import Cost
    from persona_nnsight.engine import Scored
    from persona_nnsight.grids import Grid
    from persona_nnsight.models import Model
    from persona_nnsight.plan import Plan


@dataclass(frozen=True)
class Text:
    """Greedy text of one cell under one edit; no position and layers where nothing is written."""

    persona: str
    task: str
    condition: str
    position: str | None
    layers: str | None
    text: str
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """Common to all experiments.

    Attributes:
        model, grid, plan, cost: what was run, on what.
        continuations: XY's clean greedy token ids by index of the cell in the plan.
        seconds: wall time by stage.
        complete: False when the run was interrupted; the tables then hold what was finished.
    """

    model: Model
    grid: Grid
    plan: Plan
    cost: Cost
    continuations: dict[int, tuple[int, ...]]
    seconds: dict[str, float]
    complete: bool

    def frame(self) -> pd.DataFrame:
        """The tidy table of the experiment: one row per observation."""
        raise NotImplementedError

    def summary(self) -> pd.DataFrame:
        """The table over cells."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> Path:
        """Write the run directory; see `persona_nnsight.runs`.

        Raises:
            PersonaError: the directory already holds something, or cannot be written.
        """
        return save_run(Path(directory), self._write_files)

    def _write_files(self, directory: Path) -> None:
        manifest = run_manifest(
            model=self.model,
            grid=self.grid,
            plan=self.plan,
            cost=self.cost,
            continuations=self.continuations,
            seconds=self.seconds,
            complete=self.complete,
        )
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (directory / "run.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class CaptureResult(Result):
    """Residuals and their geometry.

    Attributes:
        residuals: ``BB``, ``XB``, ``BY``, ``XY``, each float32 [cells, positions, layers, d_model],
            in the order of `plan`; NaN where a continuation ended before the position.
        cells: the plan's cells that the first axis holds.
    """

    residuals: dict[str, Tensor]
    cells: tuple[int, ...]

    def frame(self) -> pd.DataFrame:
        """Geometry per cell and site (`persona_nnsight.tables.geometry_table`)."""
        return geometry_table(self.plan, self.cells, self.residuals)

    def summary(self) -> pd.DataFrame:
        """Median geometry per site."""
        return geometry_summary(self.frame())

    def _write_files(self, directory: Path) -> None:
        tensors = {f"h_{key}": value.contiguous() for key, value in self.residuals.items()}
        axes = {
            "cells": [[self.plan.cells[i].persona, self.plan.cells[i].task] for i in self.cells],
            "positions": self.plan.positions,
            "layers": self.plan.layers,
        }
        labels = {name: json.dumps(values) for name, values in axes.items()}
        save_file(tensors, directory / "residuals.safetensors", metadata=labels)
        self.frame().to_csv(directory / "geometry.csv", index=False)
        super()._write_files(directory)


@dataclass(frozen=True, kw_only=True)
class EditResult(Result):
    """KL of every edit in every cell, and texts if they were asked for."""

    scores: list[Scored]
    texts: list[Text] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """KL per cell and edit (`persona_nnsight.tables.kl_table`)."""
        return kl_table(self.plan, self.scores)

    def summary(self) -> pd.DataFrame:
        """KL over cells per edit (`persona_nnsight.tables.kl_summary`)."""
        return kl_summary(self.frame())

    def _write_files(self, directory: Path) -> None:
        self.frame().to_csv(directory / "kl.csv", index=False)
        self.summary().to_csv(directory / "summary.csv", index=False)
        if self.texts:
            lines = (json.dumps(asdict(text), ensure_ascii=False) for text in self.texts)
            text = "\n".join(lines) + "\n"
            (directory / "text.jsonl").write_text(text, encoding="utf-8")
        super()._write_files(directory)
