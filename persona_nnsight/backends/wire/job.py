"""One job: a function of the engine carried out on a server, for a part of a plan.

This module and what it imports travel as text (`persona_nnsight.backends.wire.sources`), so it may
import torch, nnsight, transformers, the standard library, and plain modules of this package.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import nnsight
import torch
import transformers

from persona_nnsight.engine.chunk import is_far
from persona_nnsight.engine.memory import default_budget
from persona_nnsight.engine.self_check import find_path
from persona_nnsight.errors import PersonaError
from persona_nnsight.models.module_tree import ModuleTree, find_tree
from persona_nnsight.plan.costs import Limits, fit_limits
from persona_nnsight.plan.data import from_data
from persona_nnsight.plan.packing import pack
from persona_nnsight.plan.plan import Plan


def run_job(lm: Any, function: str, plan: str, dtype: str | None, attention: str) -> dict[str, Any]:
    """Carry out a plan with a function of the engine, and pack what it yields.

    Args:
        lm: the model of the server.
        function: ``module:name`` of a function like `persona_nnsight.engine.run.run`.
        plan: the plan's data as JSON.
        dtype: what the weights have to be, such as ``float32``; None takes what the server has.
        attention: the attention implementation of the model on the client's side.

    Returns:
        ``events`` and ``tensors`` of `persona_nnsight.plan.packing`, and ``facts``: what this
        ran on, and how long.

    Raises:
        PersonaError: a value that is not finite, a model the engine cannot run, another dtype, or
            an attention implementation that leaves out what was asked for.
    """
    started, start = time.time(), time.perf_counter()
    asked = from_data(json.loads(plan))
    served_dtype, device = _served(lm, find_tree(lm._module, torch.float32), asked)
    name = str(served_dtype).removeprefix("torch.")
    if dtype is not None and name != dtype:
        raise PersonaError(
            f"The server has this model in {name} and --dtype asks for {dtype}; leave --dtype out "
            "to take what the server has."
        )
    tree = find_tree(lm._module, served_dtype)
    module, _, attribute = function.partition(":")
    carry_out = getattr(import_module(module), attribute)
    with _attention(lm, attention):
        served_attention = str(lm._module.config._attn_implementation)
        limits = _limits(lm, tree, asked)
        events, tensors = pack(carry_out(lm, tree, asked, limits))
    return {
        "events": events,
        "tensors": tensors,
        "facts": {
            "dtype": name,
            "device": device,
            "attention": served_attention,
            "path": limits.path.to_data(),
            "started": started,
            "seconds": time.perf_counter() - start,
            "versions": {
                "python": platform.python_version(),
                "nnsight": nnsight.__version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
        },
    }


@contextmanager
def _attention(lm: Any, wanted: str) -> Iterator[None]:
    """Have the model use the client's attention implementation for the duration of a job.

    nnsight asks the server for it, but servers before 0.8.1 do not listen.

    Raises:
        PersonaError: it cannot be changed from here, and eager attention was asked for, which some
            models need: only it computes Gemma 2's cap of the attention logits.
    """
    module = lm._module
    found = module.config._attn_implementation
    if found == wanted:
        yield
    elif not is_far(lm):
        module.set_attn_implementation(wanted)
        try:
            yield
        finally:
            module.set_attn_implementation(found)
    elif wanted == "eager":
        raise PersonaError(
            f"The server computes this model with {found} attention, and eager attention was asked "
            f"for, without which Gemma 2's numbers are others; use --attn {found} to take them, or "
            "a server with nnsight 0.8.1 or newer."
        )
    else:
        yield


def _served(lm: Any, tree: ModuleTree, plan: Plan) -> tuple[torch.dtype, str]:
    """Dtype and device of the activations, from a forward of one token.

    In a server's sandbox the weights are in another process, and nothing else tells.
    """
    with lm.trace(input_ids=torch.tensor([[plan.pad_id]]), logits_to_keep=1):
        hidden = nnsight.save(lm.get(tree.layers)[0].input)
    return hidden.dtype, str(hidden.device)


def _limits(lm: Any, tree: ModuleTree, plan: Plan) -> Limits:
    gpu = torch.cuda.is_available()
    budget = default_budget("balanced" if gpu else "cpu")  # by the GPU with the least memory
    path = find_path(lm, tree, plan)
    return fit_limits(plan, tree, budget=budget, gpu=gpu, path=path)
