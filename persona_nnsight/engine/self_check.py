"""Which path the rows of a plan take: found by running two of its prompts both ways.

Nothing in a checkpoint says whether its model may be padded, cached, cut and entered at a layer:
positions can be counted in columns (ALiBi, a local window) or scaled by the length of the batch
(longrope), states can stand in for keys, later layers can borrow the keys of earlier ones. So the
shortest and the longest prompt, each followed by as many tokens as the plan's rows, go through all
that the fast path does, and residuals and logits are set against those of plain forwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk, is_far
from persona_nnsight.engine.fast.attention import grouped_attention
from persona_nnsight.engine.fast.decode import prompt_inputs
from persona_nnsight.engine.fast.extend import entry_layer
from persona_nnsight.engine.fast.inputs import forward_inputs
from persona_nnsight.engine.fast.kv_cache import KVCache
from persona_nnsight.engine.fast.prefill import prefill, room
from persona_nnsight.engine.memory import is_out_of_memory
from persona_nnsight.engine.plain import forget, last_logits, last_tokens, plain_inputs
from persona_nnsight.engine.whole.decode import whole_inputs
from persona_nnsight.engine.wide_logits import wide_logits
from persona_nnsight.errors import PersonaError, first_line
from persona_nnsight.method.edit_vectors import seeded_noise
from persona_nnsight.models.module_tree import ModuleTree, check_residual, has_few_bits
from persona_nnsight.models.paths import FAST, WHOLE
from persona_nnsight.plan.plan import Plan
from persona_nnsight.plan.prefix_tree import probing_tree
from persona_nnsight.plan.run_path import DECODING, KEEPS_STATES, RunPath

#: How far apart readings may be, relative to their spread: ten times what float32 rounds, or more.
_TOLERANCE = 1e-4
#: In fewer bits, so many times what one rounding of the residual does to residuals and to logits.
#: Of models that bear all, the first are below a half of it, the last below twice.
_ROUNDINGS, _LOGIT_ROUNDINGS = 1.5, 3.0
#: By how much an edited residual is longer.
_RAISED = 1.5
#: Tokens that are decoded before anything else is compared.
_DECODED = 3

#: The residuals of some tokens layer by layer, from layer 1 on, and their logits:
#: [rows, tokens, width] each. What is wrong in one layer stands out there, even in few bits,
#: before the layers above make more of every rounding.
Readings = list[Tensor]


@torch.no_grad()
def find_path(lm: Any, tree: ModuleTree, plan: Plan) -> RunPath:
    """The fast path where it gives what plain forwards give, else the whole-row path.

    Args:
        lm, tree: the model, with its weights.
        plan: what will run; it may ask for one of the two.

    Raises:
        PersonaError: a model that cannot run a prompt, whose tokens see those behind them, or that
            has more than one residual stream; or the fast path is asked for and fails.
    """
    try:
        probe = _Probe.of(lm, tree, plan)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, PersonaError):
            raise
        raise PersonaError(
            f"This model cannot run a prompt on this machine ({first_line(error)}); check that its "
            "configuration is whole, and that this version of transformers runs it."
        ) from error
    if not all(reading.isfinite().all() for reading in probe.plain):
        return RunPath(why="values overflow, so that there is nothing to compare")
    if plan.path == WHOLE:
        return _whole(probe, "asked for")
    if plan.decoding:
        return _whole(probe, DECODING)
    if tree.keeps_states and plan.path != FAST:
        return _whole(probe, KEEPS_STATES)
    try:
        with grouped_attention(lm):
            found = _fast(probe)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if plan.path == FAST:
            raise PersonaError(
                f"The fast path fails on this model ({first_line(error)}); use --path whole, or "
                "auto, which finds the way."
            ) from error
        return _whole(probe, f"the fast path fails on this model ({first_line(error)})")
    if plan.path == FAST and found.is_whole:
        return replace(found, name=FAST, why=f"asked for, although {found.why}", deepest=0)
    return found


@dataclass(frozen=True)
class _Probe:
    """Two prompts of a plan, each followed by tokens.

    Attributes:
        chunk: the model and the plan.
        prompts: of the plan, the shortest and the longest.
        follows: as many tokens as the plan's rows have; any that the model knows will do.
        plain: of their tails and of what follows, from plain forwards of one row at a time.
        tolerances: how far apart each reading may be.
    """

    chunk: Chunk
    prompts: tuple[int, int]
    follows: tuple[int, ...]
    plain: Readings
    tolerances: list[float]

    @classmethod
    def of(cls, lm: Any, tree: ModuleTree, plan: Plan) -> _Probe:
        device = torch.device("cpu") if is_far(lm) else lm.device
        chunk = Chunk(lm, tree, plan, plan.cells, device)
        by_length = sorted(range(len(plan.prompts)), key=lambda i: len(plan.prompts[i].ids))
        longest = plan.prompts[by_length[-1]].ids
        length = max(plan.reference_tokens, plan.longest_text, _DECODED)
        follows = tuple(longest[n % len(longest)] for n in range(length))
        prompts = by_length[0], by_length[-1]
        rows = [[*plan.prompts[prompt].ids, *follows] for prompt in prompts]
        kept = plan.tail + length
        plain = _plain(chunk, rows, kept)
        for residual in plain[:-1]:
            check_residual(type(lm._module).__name__, tuple(residual.shape), 2, tree)
        tolerances = [_TOLERANCE] * len(plain)
        if has_few_bits(chunk.dtype):
            rounded = _plain(chunk, rows, kept, rounded=True)
            many = [*([_ROUNDINGS] * (len(plain) - 1)), _LOGIT_ROUNDINGS]
            tolerances = [
                max(_TOLERANCE, times * _apart(moved, own))
                for times, moved, own in zip(many, rounded, plain, strict=True)
            ]
        return cls(chunk, prompts, follows, plain, tolerances)

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """Of the prompts."""
        return [self.chunk.plan.prompts[prompt].ids for prompt in self.prompts]

    def excess(self, found: Readings, expected: Readings) -> float:
        """How far apart the last readings of two runs are, in units of the tolerance.

        Args:
            found: readings of all layers, of the upper ones, or the logits alone.
            expected: the same or more of them, of as many tokens or of more behind them.
        """
        count = len(found)
        triples = zip(found, expected[-count:], self.tolerances[-count:], strict=True)
        return max(_apart(own, plain) / tolerance for own, plain, tolerance in triples)


def _fast(probe: _Probe) -> RunPath:
    """Everything that the fast path does, against plain forwards."""
    lm, plan, tree = probe.chunk.lm, probe.chunk.plan, probe.chunk.tree
    prefix = prefill(lm, plan, probing_tree(plan, probe.prompts, window=tree.window))
    chunk = replace(probe.chunk, device=prefix.opening.device)
    rows = prefix.rows(probe.prompts)
    # Of the shorter one, which is padded.
    inputs = prompt_inputs(chunk, prefix, rows[:1], _DECODED)
    excess = _decoded_excess(probe, inputs, _DECODED, probe.ids[:1])
    follows = torch.tensor([probe.follows] * 2, device=chunk.device)
    ids = torch.cat([prefix.tails[rows], follows], dim=1)
    fed = ids.shape[1]
    highest = tree.n_layers - 1
    entries = {entry_layer(plan, edit, highest) for edit in plan.edits if edit.scored}
    # At layer 0 nothing is skipped; a sandbox cannot read there.
    entries |= {max(plan.layers)} if is_far(lm) else {0, max(plan.layers)}
    inputs = forward_inputs(prefix.kv.select(rows, room=room(lm, fed)), ids)
    with wide_logits(lm), lm.trace(**inputs, logits_to_keep=last_tokens(fed, fed)):
        first = nnsight.save(chunk.layers[0].input.clone() if 0 in entries else None)
        readings = nnsight.save([])
        _read(chunk, readings, range(1, tree.n_layers), fed)
        cache = nnsight.save(lm.output.past_key_values)
    excess = max(excess, probe.excess(readings, probe.plain))
    if excess > 1:
        return replace(
            _whole(probe, "padded and cached rows are not those of plain forwards"), excess=excess
        )
    kv, start = KVCache(cache, inputs["attention_mask"]), plan.tail - 1
    if not kv.is_whole:
        kv, start = prefix.kv.select(rows), 0
    length = prefix.opening.shape[1] + start
    expected = [reading[..., start:, :] for reading in probe.plain]
    for layer in sorted(entries, reverse=True):
        before = kv.select([0, 1], length=length, first_layer=layer, room=room(lm, fed - start))
        feed = (readings[layer - 1] if layer else first)[..., start:, :]
        try:
            entered = _enter(chunk, before, ids[:, start:], feed, layer)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            continue
        if (last := probe.excess(entered, expected)) <= 1:
            why = "rows are those of plain forwards"
            return RunPath(FAST, why, excess=max(excess, last), deepest=layer)
    return _whole(probe, "rows that are cut and entered again are not those of plain forwards")


def _whole(probe: _Probe, why: str) -> RunPath:
    """The whole-row path, with what decoding may keep and what prompts may share on it."""
    causal = _is_causal(probe)
    if not causal and _looks_ahead(probe):
        raise PersonaError(
            "The tokens of this model see those behind them, so that it does not continue a text; "
            "use a decoder-only language model."
        )
    return RunPath(WHOLE, why, causal=causal, keeps_cache=causal and _keeps_cache(probe))


def _is_causal(probe: _Probe) -> bool:
    """Whether prompts of any length have the logits that they have with more behind them."""
    chunk, tail = probe.chunk, probe.chunk.plan.tail
    by_length = {len(prompt.ids): prompt.ids for prompt in chunk.plan.prompts}
    for own in by_length.values():
        alone = _plain(chunk, [own], tail)
        followed = _plain(chunk, [[*own, *probe.follows]], tail + len(probe.follows))
        expected = [reading[..., :tail, :] for reading in followed]
        if probe.excess(alone, expected) > 1:
            return False
    return True


def _looks_ahead(probe: _Probe) -> bool:
    """Whether a prompt's residuals depend on which tokens follow, and not only on how many."""
    chunk, tail = probe.chunk, probe.chunk.plan.tail
    own, kept = probe.ids[1], tail + len(probe.follows)
    others = probe.follows[::-1]
    found, expected = (
        [reading[..., :tail, :] for reading in _plain(chunk, [[*own, *follows]], kept)]
        for follows in (probe.follows, others)
    )
    return probe.excess(found, expected) > 1


def _keeps_cache(probe: _Probe) -> bool:
    """Whether rows of one length are decoded with the model's own cache as without any."""
    plan, n_tokens = probe.chunk.plan, len(probe.follows)
    try:
        for own in probe.ids:
            ids = torch.tensor([own, own], device=probe.chunk.device)
            inputs = whole_inputs(plan, ids, n_tokens)
            if _decoded_excess(probe, inputs, n_tokens, [own, own]) > 1:
                return False
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def _decoded_excess(
    probe: _Probe, inputs: dict[str, Any], n_tokens: int, prompts: Sequence[Sequence[int]]
) -> float:
    """How far the logits of a ``generate`` are from those of plain forwards over its tokens.

    In both, the residual of the prompt's last token is edited, which is to last. Infinitely far
    where a step feeds more than the last token: the next step would undo an edit.
    """
    lm, layer = probe.chunk.lm, min(1, probe.chunk.tree.n_layers - 1)
    forget(lm)
    with wide_logits(lm), lm.generate(**inputs) as tracer:
        fed = nnsight.save([])
        steps = nnsight.save([])
        for step in tracer.iter[:n_tokens]:
            hidden = probe.chunk.editable_residual(layer)
            fed.append(hidden.shape[-2])
            if step == 0:
                hidden[..., -1, :] *= _RAISED
            steps.append(lm.output.logits[:, -1].clone())
        tokens = nnsight.save(tracer.result)
    if any(count != 1 for count in fed[1:]):
        return math.inf
    written = tokens[:, -n_tokens:].tolist()
    rows = [[*own, *more[:-1]] for own, more in zip(prompts, written, strict=True)]
    logits = torch.stack(list(steps), dim=1)
    return probe.excess([logits], _plain(probe.chunk, rows, n_tokens, raised=True))


def _enter(chunk: Chunk, before: KVCache, ids: Tensor, feed: Tensor, entry: int) -> Readings:
    """Readings above the layer at which residuals enter, as in edited runs."""
    lm, layers = chunk.lm, chunk.layers
    fed = ids.shape[1]
    inputs = forward_inputs(before, ids)
    with wide_logits(lm), lm.trace(**inputs, logits_to_keep=last_tokens(fed, fed)):
        for skipped in layers[:entry]:
            skipped.skip(feed)
        layers[entry].input = feed
        readings = nnsight.save([])
        _read(chunk, readings, range(entry + 1, chunk.tree.n_layers), fed)
    return list(readings)


def _plain(
    chunk: Chunk,
    rows: Sequence[Sequence[int]],
    kept: int,
    *,
    rounded: bool = False,
    raised: bool = False,
) -> Readings:
    """Readings of the last `kept` tokens of rows that run one at a time.

    Args:
        chunk: the model.
        rows: token ids.
        kept: how many.
        rounded: whether the first residual that is read is moved by one rounding error.
        raised: whether that of the first of these tokens is made longer.
    """
    lm, layers = chunk.lm, range(1, chunk.tree.n_layers)
    unit = torch.finfo(chunk.dtype).eps / 2
    factor = 1 + unit * seeded_noise(0, "p_last", 1, chunk.tree.d_model).sign()
    found = []
    for row in rows:
        ids = torch.tensor([list(row)], device=chunk.device)
        with wide_logits(lm), lm.trace(**plain_inputs(lm, ids, kept)):
            if rounded and layers:
                hidden = chunk.editable_residual(1)
                hidden.mul_(factor.to(hidden.device))
            if raised:
                chunk.editable_residual(min(1, len(layers)))[..., -kept, :] *= _RAISED
            readings = nnsight.save([])
            _read(chunk, readings, layers, kept)
        found.append(list(readings))
    return [torch.cat(own, dim=-3) for own in zip(*found, strict=True)]


def _read(chunk: Chunk, readings: Readings, layers: Sequence[int], kept: int) -> None:
    """Within a trace: read the last `kept` tokens at `layers`, and their logits."""
    for layer in layers:
        readings.append(chunk.residual(layer)[..., -kept:, :].clone())
    readings.append(last_logits(chunk.lm, kept).clone())


def _apart(found: Tensor, plain: Tensor) -> float:
    """How far readings are from the plain ones, relative to how far these are spread.

    The root of the mean square over the tokens of a row, and the larger of the two rows': one
    token alone may come out otherwise in few bits, and padding makes no difference to one row.

    Args:
        found: [rows, tokens, width].
        plain: [rows, tokens or more, width].
    """
    expected = plain[..., : found.shape[-2], :].float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    apart = (found.to(expected.device).float() - expected).norm(dim=-1) / (spread + 1e-9)
    largest = apart.square().mean(-1).sqrt().max().item()
    return largest if math.isfinite(largest) else math.inf
