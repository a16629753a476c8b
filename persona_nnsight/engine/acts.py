"""Which code acts for which kind of intervention."""

from __future__ import annotations

from persona_nnsight.engine.act import Act
from persona_nnsight.engine.residual_writes import ResidualWrites

#: By `Intervention.kind`, one for each of `persona_nnsight.plan.interventions.KINDS`.
ACTS: dict[str, Act] = {"unedited": Act(), "write": ResidualWrites()}
