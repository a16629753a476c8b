"""What an experiment is: arguments, a plan, a result, and what is said of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from persona_nnsight.experiments.arguments import date_argument

if TYPE_CHECKING:
    import pandas as pd

    from persona_nnsight.analysis.columns import TableFile
    from persona_nnsight.backends.interface import Backend
    from persona_nnsight.experiments.results import Result
    from persona_nnsight.models.loading import Model
    from persona_nnsight.pages.blocks import Section
    from persona_nnsight.pages.stored_run import Run
    from persona_nnsight.plan.plan import Plan
    from persona_nnsight.prompts.grids import Grid
    from persona_nnsight.prompts.rendering import Day

R_co = TypeVar("R_co", bound="Result", covariant=True)

#: Called as ``progress(done, total)`` whenever work is finished; the unit is one row of a table.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Experiment(ABC, Generic[R_co]):
    """An experiment with its arguments, which are the fields that a subclass adds.

    Importing one imports neither torch nor pandas: commands show their help without them.

    Attributes:
        progress: called with (rows done, rows in all).
        backend: what does the work (`persona_nnsight.backends`); None does it here.
        date: the day that goes into prompts, ``YYYY-MM-DD``; None for today. Only where the chat
            template writes the date.
    """

    progress: Progress | None = None
    backend: Backend | None = None
    date: Day | None = date_argument()

    #: As the command and its module are called.
    name: ClassVar[str]
    #: Over a page about a run.
    title: ClassVar[str]
    #: The tables of a run directory by file name, without ``.csv``.
    files: ClassVar[Mapping[str, TableFile]]
    #: The tables that sentences are made from.
    told_from: ClassVar[Sequence[str]] = ("summary", "contrasts")

    @abstractmethod
    def plan(self, model: Model, grid: Grid) -> Plan:
        """What will be done, before anything is.

        Args:
            model: with or without its weights.
            grid: the cells.

        Raises:
            PersonaError: bad input.
        """

    @staticmethod
    @abstractmethod
    def result_type() -> type[R_co]:
        """What carrying it out returns."""

    @staticmethod
    @abstractmethod
    def sentences(tables: Mapping[str, pd.DataFrame]) -> Iterable[str]:
        """What a run's numbers allow one to say, from the tables `told_from`."""

    @staticmethod
    @abstractmethod
    def sections(run: Run) -> list[Section]:
        """What a page shows of a run that is not shown of every run."""

    @classmethod
    def findings(cls, tables: Mapping[str, pd.DataFrame]) -> list[str]:
        """Sentences about a run; none where a table that they are made from is not there.

        Args:
            tables: those of its run directory that it has, by name.
        """
        there = all(name in tables for name in cls.told_from)
        return list(cls.sentences(tables)) if there else []
