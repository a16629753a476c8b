"""The one session block that runs a job, whichever nnsight backend carries it."""

from __future__ import annotations

import inspect
import json
from typing import Any

import nnsight
from nnsight.schema.request import RequestModel

from persona_nnsight.backends.interface import EngineFunction
from persona_nnsight.backends.wire import importing, job
from persona_nnsight.backends.wire.sources import shipped_name, shipped_sources
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.data import to_data
from persona_nnsight.plan.plan import Plan


def job_sources(function: EngineFunction) -> dict[str, str]:
    """The source text that a job of `function` ships (`shipping.shipped_sources`)."""
    return shipped_sources((job.__name__, function.__module__))


def run_block(
    model: Model, function: EngineFunction, plan: Plan, dtype: str | None, backend: Any
) -> dict[str, Any] | None:
    """Open an nnsight session on `backend` whose body is one job.

    The body holds text and plain data only, so nothing is pickled that the far side could
    understand differently.

    Args:
        model: without weights for a server.
        function: of the engine.
        plan: all of it is one job.
        dtype: what the weights there have to be, or None.
        backend: an nnsight backend.

    Returns:
        The answer of `job.run_job`, or None where the backend only keeps the request.
    """
    sources = job_sources(function)
    entry = f"{shipped_name(job.__name__, sources)}:{job.run_job.__name__}"
    request = {
        "function": f"{shipped_name(function.__module__, sources)}:{function.__name__}",
        "plan": json.dumps(to_data(plan)),
        "dtype": dtype,
        "attention": model.attention,
    }
    lm: Any = model.lm
    bootstrap = inspect.getsource(importing)
    answer: dict[str, Any] | None = None  # nnsight sets it, from the block, which is not run here
    with lm.session(backend=backend):
        far: dict[str, Any] = {}
        exec(compile(bootstrap, "<persona_nnsight job>", "exec"), far)
        answer = nnsight.save(far["run"](lm, sources, entry, request))
    return answer  # noqa: RET504


class Envelope:
    """An nnsight backend that serialises a block and keeps it, as ``blob``."""

    def __init__(self) -> None:
        self.blob = b""

    def __call__(self, tracer: Any) -> None:
        """Take the block that nnsight captured."""
        self.blob = RequestModel.serialize(tracer, compress=True)
