"""What an experiment returns: tables, tensors, texts, and everything needed to say where from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import MARGIN
from persona_nnsight.analysis.geometry_tables import geometry_summary
from persona_nnsight.analysis.kl_tables import contrasts, kl_summary, kl_table
from persona_nnsight.analysis.marker_tables import (
    Text,
    marker_contrasts,
    marker_summary,
    marker_table,
)
from persona_nnsight.analysis.wording import ties
from persona_nnsight.errors import PersonaError
from persona_nnsight.method.sites import generated_index
from persona_nnsight.storage.manifest import run_manifest
from persona_nnsight.storage.residuals import Residuals
from persona_nnsight.storage.run_directory import RUN, save_run
from persona_nnsight.storage.vectors import Vectors

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from persona_nnsight.experiments.experiment import Experiment
    from persona_nnsight.models.loading import Model
    from persona_nnsight.plan.costs import Cost
    from persona_nnsight.plan.events import Scored
    from persona_nnsight.plan.plan import Plan
    from persona_nnsight.prompts.grids import Grid


@dataclass(frozen=True, kw_only=True)
class Result:
    """Common to all experiments. It can be pickled; the weights of `model` stay behind.

    Attributes:
        experiment: what was asked.
        model, grid, plan, cost: what was run, on what.
        continuations: XY's clean greedy token ids by index of the cell in the plan.
        margins: by cell, the closest of the greedy choices that these are: the smallest gap between
            a token's logit and the next one's. 0 is a tie, of which the lowest token id is taken.
        geometry: how the effects add up per cell and site (`tables.geometry_table`); no rows where
            Δ_X was given.
        scores: the KLs, if any were asked for.
        texts: greedy texts, if any were asked for.
        residuals: ``BB``, ``XB``, ``BY``, ``XY``, each float32 [cells, positions, layers, d_model],
            joined when it is asked for (`persona_nnsight.storage.residuals`); the cells are those
            of `continuations`, in its order; NaN where a continuation ended before the position.
            None unless they are what was asked for.
        seconds: wall time by stage; of the whole pass where several plans shared one.
        complete: False when the run was interrupted; the tables then hold what was finished.
        where: where it was run (`persona_nnsight.backends.interface.Backend.record`).
    """

    experiment: Experiment[Any]
    model: Model
    grid: Grid
    plan: Plan
    cost: Cost
    continuations: dict[int, tuple[int, ...]]
    margins: dict[int, float]
    geometry: pd.DataFrame
    scores: list[Scored]
    texts: list[Text]
    residuals: Residuals | None
    seconds: dict[str, float]
    complete: bool
    where: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all of it but the model's weights and what followed the run."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        asked = replace(self.experiment, progress=None, backend=None)
        return {**kept, "experiment": asked, "model": self.model.without_weights()}

    def frame(self) -> pd.DataFrame:
        """The tidy table of the experiment: one row per observation."""
        raise NotImplementedError

    def summary(self) -> pd.DataFrame:
        """The table over cells."""
        raise NotImplementedError

    def findings(self) -> list[str]:
        """What the numbers allow one to say, in sentences."""
        return [*self.experiment.findings(self.tables), *ties(self.margins.values())]

    def save(self, directory: str | Path, *, finishes: bool = False) -> Path:
        """Write the run directory; see `persona_nnsight.storage.run_directory`.

        Args:
            directory: where the run goes.
            finishes: it may hold the journal of this run, which then goes.

        Raises:
            PersonaError: the directory already holds something, or cannot be written.
        """
        return save_run(Path(directory), self.write_files, finishes=finishes)

    def write_files(self, directory: Path) -> None:
        """Write all files of the run into an existing directory."""
        for name, table in self.tables.items():
            if len(table):
                table.to_csv(directory / f"{name}.csv", index=False)
        if self.texts:
            lines = (json.dumps(_present(text), ensure_ascii=False) for text in self.texts)
            (directory / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        manifest = run_manifest(
            model=self.model,
            grid=self.grid,
            plan=self.plan,
            cost=self.cost,
            continuations=self.continuations,
            margins=self.margins,
            seconds=self.seconds,
            complete=self.complete,
            where=self.where,
            margin=self._margin,
        )
        # Halves of letters, which a path may have, are written by their numbers, as JSON has them.
        escape = "backslashreplace"
        with open(directory / RUN, "w", encoding="utf-8", errors=escape) as file:
            # Not as one text: of many cells it is long.
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            file.write("\n")

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of the run directory by file name; empty ones are not written."""
        raise NotImplementedError

    @property
    def _margin(self) -> float | None:
        """What its experiment was asked for, where it has verdicts on KLs."""
        return getattr(self.experiment, "margin", None)


def _present(text: Text) -> dict[str, object]:
    """A text as JSON-like data; the factors of a steering only where there was one."""
    data = asdict(text)
    if text.alpha is None:
        del data["alpha"], data["beta"]
    return data


@dataclass(frozen=True, kw_only=True)
class CaptureResult(Result):
    """Residuals and their geometry."""

    residuals: Residuals

    def frame(self) -> pd.DataFrame:
        """Geometry per cell and site."""
        return self.geometry

    def summary(self) -> pd.DataFrame:
        """Median geometry per site (`geometry_summary`)."""
        return self.tables["summary"]

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of the run directory by file name; empty ones are not written."""
        return {"geometry": self.geometry, "summary": geometry_summary(self.geometry)}

    def vectors(self) -> Vectors:
        """The pure effects at the prompt positions, to be saved and applied to other tasks.

        Raises:
            PersonaError: the residuals are of generated positions alone, where the effects belong
                to one continuation.
        """
        plan, grid = self.plan, self.grid
        positions = [name for name in plan.positions if not generated_index(name)]
        if not positions:
            raise PersonaError(
                "Effects can be saved at p_last and p_user_last only; at generated tokens they "
                "belong to one continuation."
            )
        at = [plan.positions.index(name) for name in positions]

        def h(key: str, row: int) -> Tensor:
            return self.residuals.of(key, row)[at]

        cells = [plan.cells[index] for index in self.continuations]
        # XB is one prompt whatever the task, and BY whatever the persona: the first cell will do.
        x_row = {cell.persona: row for row, cell in reversed(list(enumerate(cells)))}
        y_row = {cell.task: row for row, cell in reversed(list(enumerate(cells)))}
        return Vectors(
            model_id=self.model.weights.model_id,
            model_sha256=self.model.weights.sha256,
            architecture=self.model.architecture,
            n_layers=self.model.tree.n_layers,
            d_model=self.model.tree.d_model,
            template=grid.template,
            baseline_persona=grid.baseline_persona,
            baseline_task=grid.baseline_task,
            positions=tuple(positions),
            layers=plan.layers,
            personas={p.key: p.text for p in grid.personas if p.key in x_row},
            tasks={t.key: t.text for t in grid.tasks if t.key in y_row},
            base=h("BB", 0),
            delta_x={key: h("XB", row) - h("BB", row) for key, row in x_row.items()},
            delta_y={key: h("BY", row) - h("BB", row) for key, row in y_row.items()},
            date=plan.rendering.date,
        )

    def write_files(self, directory: Path) -> None:
        """Write all files of the run into an existing directory."""
        cells = [self.plan.cells[index] for index in self.continuations]
        axes = {
            "cells": [[cell.persona, cell.task] for cell in cells],
            "positions": self.plan.positions,
            "layers": self.plan.layers,
        }
        labels = {name: json.dumps(values) for name, values in axes.items()}
        self.residuals.write(directory / "residuals.safetensors", labels)
        super().write_files(directory)


@dataclass(frozen=True, kw_only=True)
class EditResult(Result):
    """KL of every edit in every cell."""

    def frame(self) -> pd.DataFrame:
        """KL per cell and edit (`kl_table`)."""
        return self.tables["kl"]

    def summary(self) -> pd.DataFrame:
        """KL over cells per edit (`kl_summary`)."""
        return self.tables["summary"]

    def contrasts(self) -> pd.DataFrame:
        """Paired differences from the controls (`contrasts`)."""
        return self.tables["contrasts"]

    def marker_summary(self) -> pd.DataFrame | None:
        """Markers in the texts over cells (`marker_summary`), if any."""
        markers = self.tables["markers"]
        return marker_summary(markers) if len(markers) else None

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of the run directory by file name; empty ones are not written."""
        kl = kl_table(self.plan, self.scores)
        return {
            "kl": kl,
            "summary": kl_summary(kl),
            "contrasts": contrasts(kl, MARGIN if self._margin is None else self._margin),
            "geometry": self.geometry,
            "markers": marker_table(self.grid, self.texts),
        }


@dataclass(frozen=True, kw_only=True)
class MarkersResult(Result):
    """Greedy texts under edits, and the markers in them."""

    def frame(self) -> pd.DataFrame:
        """Markers per text (`marker_table`)."""
        return self.tables["markers"]

    def summary(self) -> pd.DataFrame:
        """Markers over cells per edit (`marker_summary`)."""
        return self.tables["summary"]

    def contrasts(self) -> pd.DataFrame:
        """Paired differences between conditions (`marker_contrasts`)."""
        return self.tables["contrasts"]

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of the run directory by file name; empty ones are not written."""
        markers = marker_table(self.grid, self.texts)
        return {
            "markers": markers,
            "summary": marker_summary(markers),
            "contrasts": marker_contrasts(markers),
            "geometry": self.geometry,
        }
