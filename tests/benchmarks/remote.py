"""What a plan sends to an NDIF server: its jobs as the backend would cut them, with no server."""

from __future__ import annotations

from persona_nnsight import Model
from persona_nnsight.backends.block import Envelope, run_block
from persona_nnsight.backends.ndif import NdifBackend
from persona_nnsight.backends.server import Server
from persona_nnsight.engine import run
from persona_nnsight.plan import Plan
from persona_nnsight.plan_data import part_of


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
