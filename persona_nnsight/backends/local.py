"""On this machine, and kept in the run directory as it goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from persona_nnsight.backends.interface import EngineFunction
from persona_nnsight.engine.memory import default_budget
from persona_nnsight.engine.self_check import find_path
from persona_nnsight.errors import OutOfMemoryError, PersonaError
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.costs import Limits, check_budget, fit_limits
from persona_nnsight.plan.data import digest
from persona_nnsight.plan.events import Done, Event
from persona_nnsight.plan.plan import Plan
from persona_nnsight.plan.run_path import RunPath, expected_path
from persona_nnsight.storage.journal import Journal, JournalError, damaged
from persona_nnsight.storage.kept_events import Parts
from persona_nnsight.storage.run_directory import PENDING

#: What a journal says of who writes it.
LOCAL = "local"

#: Paths by model and plan: one is asked for when costs are shown, and when the plan is run.
_found: WeakKeyDictionary[Any, dict[str, RunPath]] = WeakKeyDictionary()


class LocalBackend:
    """Runs on a model that was loaded with its weights.

    Args:
        model: with its weights.
        memory_budget: bytes that a run may take beside the weights, on the device that computes;
            None for half of what is free there when it begins.
        journal: where results are kept as they are finished, and taken from; None keeps nothing.
    """

    def __init__(
        self, model: Model, *, memory_budget: int | None = None, journal: Journal | None = None
    ) -> None:
        self.model = model
        self.memory_budget = memory_budget
        self.journal = journal
        self._parts: Parts | None = None
        self._took: RunPath | None = None

    def limits(self, plan: Plan) -> Limits:
        """Batches that fit in the memory budget, or those that a run was begun with.

        Raises:
            PersonaError: not even one cell fits.
        """
        if self.journal is not None and (known := self._limits_begun_with(plan)) is not None:
            return known
        device, tree = self.model.device, self.model.tree
        path = self._path(plan)
        budget = self.memory_budget
        if budget is None:
            budget = default_budget(device)
        else:
            check_budget(plan, tree, budget, path)
        return fit_limits(plan, tree, budget=budget, gpu=device != "cpu", path=path)

    def _path(self, plan: Plan) -> RunPath:
        """The path that the plan's rows take; without weights, what can be told without."""
        if not self.model.has_weights:
            return expected_path(self.model.tree, plan)
        known = _found.setdefault(self.model.lm, {})
        key = digest(plan)
        if key not in known:
            known[key] = find_path(self.model.lm, self.model.tree, plan)
        return known[key]

    def _limits_begun_with(self, plan: Plan) -> Limits | None:
        """The batch sizes that a plan was begun with: with others, last digits would differ."""
        assert self.journal is not None
        try:
            known = self.journal.state.get("limits", {}).get(digest(plan))
            return None if known is None else Limits.from_data(known)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise damaged(self.journal.directory / PENDING, error) from error

    def run(self, function: EngineFunction, plan: Plan, limits: Limits) -> Iterator[Event]:
        """See `Backend.run`.

        What a journal holds of the plan comes first. Where it holds nothing and the run fails, the
        journal is removed.

        Raises:
            PersonaError: a value that is not finite, memory that runs out, or a journal that
                cannot be written.
        """
        self._require_weights()
        self._took = limits.path
        if self.journal is None:
            yield from function(self.model.lm, self.model.tree, plan, limits)
            return
        key = digest(plan)
        self.journal.claim()
        self._parts = parts = Parts(self.journal, key)
        done = Done()
        try:
            self._note_limits(key, limits)
            for event in parts.events():
                if done.add(event):
                    yield event
            for event in function(self.model.lm, self.model.tree, plan, limits, done):
                if done.add(event):
                    yield parts.add(event)
            parts.flush()
        except PersonaError as error:
            self._leave(error, parts)

    def _note_limits(self, key: str, limits: Limits) -> None:
        """Write down the batch sizes of a plan, which may be one of several."""
        assert self.journal is not None
        begun = self.journal.state.setdefault("limits", {})
        if key not in begun:
            begun[key] = asdict(limits)
            self.journal.save()

    def _leave(self, error: PersonaError, parts: Parts) -> NoReturn:
        """Keep what is finished, unless an error would only come again, and raise the error."""
        assert self.journal is not None
        comes_again = not isinstance(error, OutOfMemoryError | JournalError)
        if isinstance(error, OutOfMemoryError):
            with suppress(PersonaError):
                parts.flush()
        if not self.journal.loaded and (comes_again or not self.journal.has_parts):
            self._drop()
            raise error
        self._parts = None
        self.journal.release()
        raise PersonaError(
            f"{error} What was finished is kept: `persona resume {self.journal.directory}`."
        ) from error

    def _require_weights(self) -> None:
        if not self.model.has_weights:
            raise PersonaError(
                "This model was loaded without weights; use load_model(...) as it is."
            )

    def record(self, plan: Plan | None = None) -> dict[str, Any]:
        """See `Backend.record`."""
        begun = {} if self.journal is None else {"argv": self.journal.argv}
        took = {} if self._took is None else {"path": self._took.to_data()}
        return {"name": LOCAL, **took, **begun}

    def close(self) -> None:
        """See `Backend.close`; what is finished and not yet kept is written down.

        Raises:
            JournalError: it cannot be written.
        """
        if self.journal is None or self._parts is None:
            return
        try:
            self._parts.flush()
        finally:
            if self.journal.loaded or self.journal.has_parts:
                self.journal.release()
            else:
                self._drop()

    def _drop(self) -> None:
        """Leave no trace of a run that has nothing to be gone on with."""
        assert self.journal is not None
        self._parts = None
        self.journal.discard()
