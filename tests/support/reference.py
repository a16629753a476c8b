"""The oracle: docs/method.md §§1 to 8 in plain transformers and PyTorch hooks, slow and literal.

No nnsight, no KV cache, no batching: one sequence at a time, one full forward for each edit, and
one for each unedited text, whose residuals and logits are kept for the next question about it.
Imports nothing from the package, so that agreement with it means something.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Edits = Mapping[int, Mapping[int, Tensor]]
"""{layer: {absolute position: vector}}: what to write into the residual stream, and where."""

LAYER_PATHS = (
    *("model.language_model.layers", "model.layers", "transformer.h", "transformer.blocks"),
    *("gpt_neox.layers", "backbone.layers"),
)
CONDITIONS = ("additive", "remove_x", "remove_y", "bb", "by", "xb", "clean", "other_x")
INJECTIONS = ("host", "oracle", "cached")

_KEPT = 8
"""Unedited texts whose residuals and logits are kept: those of one cell, on one continuation."""


@dataclass(frozen=True)
class Score:
    """A KL summed over a window, and the number of tokens in that window.

    The window is empty (`n_tokens` 0, `kl` NaN) where the continuation ended at the site.
    """

    kl: float
    n_tokens: int


def role_prompt(persona: str, task: str) -> str:
    return f"As {persona}, {task}"


def grid_prompts(
    persona: str,
    task: str,
    baseline_persona: str,
    baseline_task: str,
    donor: str | None = None,
) -> dict[str, str]:
    """The user texts of a cell: BB, XB, BY, XY, and X'B (another persona) with a donor."""
    prompts = {
        "BB": role_prompt(baseline_persona, baseline_task),
        "XB": role_prompt(persona, baseline_task),
        "BY": role_prompt(baseline_persona, task),
        "XY": role_prompt(persona, task),
    }
    if donor is not None:
        prompts["X'B"] = role_prompt(donor, baseline_task)
    return prompts


def generated_index(position: str) -> int:
    """K of the position name "gk"; 0 for p_last and p_user_last."""
    if position in ("p_last", "p_user_last"):
        return 0
    if position.startswith("g") and position[1:].isdigit() and int(position[1:]) >= 1:
        return int(position[1:])
    raise ValueError(f"unknown position {position!r}")


def vector(condition: str, h: Mapping[str, Tensor]) -> Tensor:
    """The float32 vector that a condition writes, from the cell's residuals at one site."""
    delta_x = h["XB"] - h["BB"]
    delta_y = h["BY"] - h["BB"]
    if condition == "additive":
        return h["BB"] + delta_x + delta_y
    if condition == "remove_x":
        return h["XY"] - delta_x
    if condition == "remove_y":
        return h["XY"] - delta_y
    if condition == "other_x":
        return h["BB"] + (h["X'B"] - h["BB"]) + delta_y
    if condition in ("bb", "by", "xb"):
        return h[condition.upper()]
    if condition == "clean":
        return h["XY"]
    raise ValueError(f"unknown condition {condition!r}")


def decomposition(h: Mapping[str, Tensor]) -> dict[str, float]:
    """docs/method.md §3: cosines and shares at one site, with their controls."""
    eps = 1e-9
    delta_x, delta_y, delta_xy = (h[name] - h["BB"] for name in ("XB", "BY", "XY"))
    inter = delta_xy - delta_x - delta_y

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b) / (float(a.norm()) * float(b.norm()) + eps)

    def rest(a: Tensor) -> float:
        return float((delta_xy - a).norm()) / (float(delta_xy.norm()) + eps)

    found = {
        "cos_xy_sum": cosine(delta_xy, delta_x + delta_y),
        "cos_xy_y": cosine(delta_xy, delta_y),
        "cos_xy_x": cosine(delta_xy, delta_x),
        "cos_x_y": cosine(delta_x, delta_y),
        "inter_over_xy": float(inter.norm()) / (float(delta_xy.norm()) + eps),
        "rest_y": rest(delta_y),
        "rest_x": rest(delta_x),
    }
    if "X'B" in h:
        other = h["X'B"] - h["BB"] + delta_y
        found |= {"cos_xy_other": cosine(delta_xy, other), "rest_other": rest(other)}
    return found


def kl(clean_logprobs: Tensor, patched_logprobs: Tensor) -> float:
    """Sum over the window of KL(clean || patched), in nats."""
    return float((clean_logprobs.exp() * (clean_logprobs - patched_logprobs)).sum())


def _score(clean: Tensor, patched: Tensor) -> Score:
    n = clean.shape[0]
    return Score(kl(clean, patched) if n else math.nan, n)


class Reference:
    """Residuals, edits, continuations and KLs of one model, one forward at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos: Collection[int],
        layers: str | None = None,
    ) -> None:
        """`eos`: the tokens that end a continuation, which whoever asks has to know.

        `layers`: the path of the decoder layers, where it is none of `LAYER_PATHS`.
        """
        self.model = model.train(False)
        self.tokenizer = tokenizer
        self.layers = self._find_layers(model, LAYER_PATHS if layers is None else (layers,))
        self.eos = frozenset(eos)
        known = inspect.signature(type(model).forward).parameters
        self._options = {"use_cache": False} if "use_cache" in known else {}
        self._unedited: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = {}

    # ------------------------------------------------------------------- primitives

    @staticmethod
    def _find_layers(model: PreTrainedModel, paths: Sequence[str]) -> nn.ModuleList:
        for path in paths:
            found: Any = model
            for name in path.split("."):
                found = getattr(found, name, None)
            if isinstance(found, nn.ModuleList):
                return found
        raise ValueError(f"no decoder layers known for {type(model).__name__}")

    def ids(self, text: str, generation_prompt: bool = True) -> list[int]:
        """A user message, through the chat template rendered to text, as token ids."""
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            enable_thinking=False,
        )
        assert isinstance(rendered, str)
        encoded = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return [int(i) for i in cast("list[int]", encoded)]

    @contextmanager
    def _pre_hook(self, layer: int, hook: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """`hook` gets the input of a decoder layer, and may return another in its place."""

        def pre_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                new = hook(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = hook(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        handle = self.layers[layer].register_forward_pre_hook(pre_hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _editing(self, edits: Edits | None) -> Iterator[None]:
        """Write every edit, on every forward that is long enough to have its position."""
        with ExitStack() as hooks:
            for layer, writes in (edits or {}).items():
                hooks.enter_context(self._pre_hook(layer, self._writer(writes)))
            yield

    @staticmethod
    def _writer(writes: Mapping[int, Tensor]) -> Callable[[Tensor], Tensor]:
        def write(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            for position, value in writes.items():
                assert position >= 0, "absolute positions only"
                if position < hidden.shape[1]:
                    hidden[0, position] = value.to(device=hidden.device, dtype=hidden.dtype)
            return hidden

        return write

    @torch.no_grad()
    def _logits(self, ids: Sequence[int], edits: Edits | None = None) -> Tensor:
        """One forward over one sequence: float32 logits [len(ids), vocab]."""
        with self._editing(edits):
            tokens = torch.tensor([list(ids)], device=self.model.device)
            output = self.model(input_ids=tokens, **self._options)
        return cast(Tensor, output.logits[0].float())

    def greedy(self, ids: Sequence[int], n: int, edits: Edits | None = None) -> list[int]:
        """Up to n greedy tokens; an end-of-sequence token is kept, as the last one."""
        new: list[int] = []
        while len(new) < n and not (new and new[-1] in self.eos):
            new.append(int(self._logits([*ids, *new], edits)[-1].argmax()))
        return new

    def _clean(self, ids: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """One unedited forward: the input of every layer, float32 [len(ids), d], and the logits."""
        key = tuple(ids)
        if key not in self._unedited:
            if len(self._unedited) >= _KEPT:
                del self._unedited[next(iter(self._unedited))]
            seen: list[Tensor] = []

            def keep(hidden: Tensor) -> None:
                seen.append(hidden[0].detach().float().clone())

            with ExitStack() as hooks:
                for layer in range(len(self.layers)):
                    hooks.enter_context(self._pre_hook(layer, keep))
                logits = self._logits(ids)
            assert len(seen) == len(self.layers)
            self._unedited[key] = seen, logits
        return self._unedited[key]

    def residual(self, ids: Sequence[int], layer: int, position: int) -> Tensor:
        """The input of decoder layer `layer` at an absolute position, as float32 [d]."""
        assert 0 <= position < len(ids)
        residuals, _ = self._clean(ids)
        return residuals[layer][position]

    def logprobs(
        self, ids: Sequence[int], start: int, n: int, edits: Edits | None = None
    ) -> Tensor:
        """Log-probabilities [n, vocab] for the tokens at positions start..start+n-1."""
        assert start >= 1
        assert start + n <= len(ids)
        logits = self._logits(ids, edits) if edits else self._clean(ids)[1]
        return logits[start - 1 : start - 1 + n].log_softmax(-1)

    # ----------------------------------------------------- docs/method.md §§2 to 8

    def positions(self, user_text: str, position: str, continuation: Sequence[int]) -> int:
        """The absolute index of p_last, p_user_last or gk in prompt + continuation."""
        if position == "p_user_last":
            return len(self.ids(user_text, generation_prompt=False)) - 1
        k = generated_index(position)
        if k > len(continuation):
            raise ValueError(f"{position}: the continuation has {len(continuation)} tokens")
        return len(self.ids(user_text)) - 1 + k

    def continuation(
        self, prompts: Mapping[str, str], positions: Sequence[str], window: int = 10
    ) -> list[int]:
        """XY's greedy continuation: window + max k tokens, fewer if it ends."""
        extra = max((generated_index(p) for p in positions), default=0)
        return self.greedy(self.ids(prompts["XY"]), window + extra)

    def cell_residuals(
        self,
        prompts: Mapping[str, str],
        position: str,
        layer: int,
        continuation: Sequence[int],
    ) -> dict[str, Tensor]:
        """The residual of every prompt at one site, all on XY's continuation."""
        return {
            name: self.residual(
                [*self.ids(text), *continuation],
                layer,
                self.positions(text, position, continuation),
            )
            for name, text in prompts.items()
        }

    def substitution_kl(
        self,
        prompts: Mapping[str, str],
        position: str,
        layer: int,
        condition: str,
        continuation: Sequence[int],
        window: int = 10,
    ) -> Score:
        """Write one vector into XY at one site; KL over the window after the site."""
        h = self.cell_residuals(prompts, position, layer, continuation)
        prompt = self.ids(prompts["XY"])
        sequence = [*prompt, *continuation]
        site = self.positions(prompts["XY"], position, continuation)
        k = generated_index(position)  # the window is the generated tokens k+1..k+window
        n = min(window, len(continuation) - k)
        start = len(prompt) + k
        clean = self.logprobs(sequence, start, n)
        patched = self.logprobs(sequence, start, n, {layer: {site: vector(condition, h)}})
        return _score(clean, patched)

    def injection_kl(
        self,
        prompts: Mapping[str, str],
        layers: Sequence[int],
        injection: str,
        continuation: Sequence[int],
        window: int = 10,
    ) -> Score:
        """Score XY's first tokens on the BY prompt, with vectors written at its p_last.

        host: nothing written; oracle: h_XY; cached: h_BB+Δ_X+Δ_Y, each layer its own.
        """
        target, host = self.ids(prompts["XY"]), self.ids(prompts["BY"])
        tokens = list(continuation[:window])
        n = len(tokens)
        if injection == "host":
            edits: dict[int, dict[int, Tensor]] = {}
        elif injection in INJECTIONS:
            condition = {"oracle": "clean", "cached": "additive"}[injection]
            edits = {}
            for layer in layers:
                h = self.cell_residuals(prompts, "p_last", layer, tokens)
                edits[layer] = {len(host) - 1: vector(condition, h)}
        else:
            raise ValueError(f"unknown injection {injection!r}")
        clean = self.logprobs([*target, *tokens], len(target), n)
        patched = self.logprobs([*host, *tokens], len(host), n, edits)
        return _score(clean, patched)
