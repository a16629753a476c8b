"""A model actor for a machine without a GPU; the server is told to use it by its environment.

NDIF's own actor measures GPU memory and places the model on cards. This one loads it on the CPU and
is otherwise NDIF's: jobs run in the server's process, or, while the file exists that
NDIF_CPU_SANDBOX_FILE names, in its sandbox, as a public server runs those of people it does not
know.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import torch
from ndif.services.ray.deployments.modeling.base import HuggingFaceModel
from ndif.services.ray.sandbox.model import SandboxModelDeployment

torch.cuda.synchronize = lambda *_, **__: None
torch.cuda.empty_cache = lambda *_, **__: None


class CpuModelDeployment(SandboxModelDeployment):
    """Loads weights on the CPU."""

    CACHEABLE = False

    def load_from_disk(self) -> Any:
        self.gpu_mem_bytes_by_id: dict[int, int] = {}
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def execute(self, request: Any) -> Any:
        # Without a database of keys the server trusts everybody.
        request.trusted = not os.path.exists(os.environ["NDIF_CPU_SANDBOX_FILE"])
        return super().execute(request)


@ray.remote(num_cpus=0, max_restarts=-1)
class CpuModelActor(CpuModelDeployment):
    """What NDIF_DEFAULT_MODEL_ACTOR_CLASS names."""
