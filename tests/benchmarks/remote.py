"""What a plan sends to an NDIF server: its jobs as the backend would cut them, with no server."""

from __future__ import annotations

from persona_nnsight import Model
from persona_nnsight.backends.ndif.backend import NdifBackend
from persona_nnsight.backends.ndif.server import Server
from persona_nnsight.backends.wire.session import Envelope, run_block
from persona_nnsight.engine.run import run
from persona_nnsight.plan.joining import part_of
from persona_nnsight.plan.plan import Plan


def job_bytes(model: Model, plan: Plan) -> list[int]:
    """Bytes of each job's request, compressed as they travel."""
    backend = NdifBackend(model, Server("http://127.0.0.1", with_key=False))
    size = backend.limits(plan).cells
    sizes = []
    for start in range(0, len(plan.cells), size):
        envelope = Envelope()
        part = part_of(plan, range(start, min(start + size, len(plan.cells))))
        run_block(model, run, part, None, envelope)
        sizes.append(len(envelope.blob))
    return sizes
