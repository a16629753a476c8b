"""Every nnsight trace of the project: prefill, generate, extend.

A plan runs in chunks of cells, each in four steps:

1. *prefill*: the opening of every unique prompt runs once and leaves its KV cache. The last few
   tokens, the *tail* (from the first asked prompt position to ``p_last``), stay out of it.
2. *record*: one traced ``generate`` from the tails records the residuals of BB, XB, BY and XY at
   every asked site while XY decodes its clean continuation; the baselines are teacher-forced onto
   it by giving them XY's logits. XY alone then decodes the rest of the continuation.
3. *extend*: tails and continuation of the host prompt run once unedited. This keeps the clean
   log-probabilities and, at the layers to be edited, the residuals of every token.
4. *score*: rows of (cell, condition) run over the same tokens with one residual overwritten. What
   lies below the lowest edited layer is unchanged by the edit, so those layers are skipped and the
   stored residuals enter at the edited layer. KL is taken inside the trace; only numbers leave.

Rows of different cells and conditions share batches: padding stands on the left, positions are
explicit, and no cache is ever cropped, so sliding-window caches need no special case.

This module runs as it is on a remote server: it imports torch, nnsight, transformers and the
plain-data modules of this package, and returns small things.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from persona_nnsight.costs import Limits, fed_tokens
from persona_nnsight.errors import PersonaError
from persona_nnsight.interventions import edit_vector, seeded_noise
from persona_nnsight.measures import window_kl
from persona_nnsight.module_tree import ModuleTree
from persona_nnsight.plan import CellPlan, Edit, Plan, unique_prompts
from persona_nnsight.sites import generated_index

#: Plain argmax decoding of a fixed number of tokens, whatever a checkpoint's own generation
#: settings say (some penalise repetition even when not sampling). The end of a continuation is
#: found afterwards, so that every row of a batch takes the same steps.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "eos_token_id": None,
    "use_cache": True,
}


@dataclass(frozen=True)
class Recorded:
    """Clean continuations of a chunk of cells, and their residuals if the plan has no edits.

    Attributes:
        cells: indices into `Plan.cells`.
        continuations: token ids per cell, ended by the first end-of-sequence token.
        residuals: float32 [cells, positions, layers, d_model] by residual key, on the CPU; NaN
            where a continuation ended before the position.
    """

    cells: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    residuals: dict[str, Tensor] | None


@dataclass(frozen=True)
class Scored:
    """One KL: `cell` and `edit` index the plan; NaN where `n_tokens` is 0."""

    cell: int
    edit: int
    kl: float
    n_tokens: int


@dataclass(frozen=True)
class Written:
    """Greedy text of one cell under one edit; `edit` None is the unedited XY prompt."""

    cell: int
    edit: int | None
    tokens: tuple[int, ...]


Event = Recorded | Scored | Written


@torch.no_grad()
def run(lm: Any, tree: ModuleTree, plan: Plan, limits: Limits) -> Iterator[Event]:
    """Carry out `plan` on an nnsight model; results come as they are finished.

    Raises:
        PersonaError: a residual or logit that is not finite, or a model whose KV cache cannot be
            shared between rows.
    """
    for start in range(0, len(plan.cells), limits.cells):
        chunk = range(start, min(start + limits.cells, len(plan.cells)))
        yield from _run_chunk(lm, tree, plan, chunk, limits)


def _run_chunk(
    lm: Any, tree: ModuleTree, plan: Plan, chunk: range, limits: Limits
) -> Iterator[Event]:
    cells = [plan.cells[index] for index in chunk]
    prefix = _prefill(lm, tree, plan, unique_prompts(plan, cells))
    record = _record(lm, tree, plan, cells, prefix)
    yield Recorded(
        cells=tuple(chunk),
        continuations=tuple(
            tuple(row[:length])
            for row, length in zip(
                record.continuations.tolist(), record.lengths.tolist(), strict=True
            )
        ),
        residuals=None if plan.edits else _public_residuals(record, plan),
    )
    if not plan.edits:
        return
    clean = _extend(lm, tree, plan, cells, "XY", prefix, record)
    host = clean if plan.host == "XY" else _extend(lm, tree, plan, cells, plan.host, prefix, record)
    for edits in _edit_groups(plan):
        rows = [(cell, edit) for edit in edits for cell in range(len(cells))]
        for batch in _batches(rows, limits.rows):
            results = _score(lm, tree, plan, cells, prefix, record, clean.logprobs, host, batch)
            for (cell, edit), (kl, count) in zip(batch, results, strict=True):
                yield Scored(chunk[cell], edit, kl, count)
    texts = [(cell, edit) for edit in plan.text_edits for cell in range(len(cells))]
    for writing in _batches(texts, limits.rows):
        written = _write(lm, tree, plan, cells, prefix, record, writing)
        for (cell, text_edit), tokens in zip(writing, written, strict=True):
            yield Written(chunk[cell], text_edit, tokens)


# --- prefill ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prefix:
    """KV caches of prompt openings, one row per unique prompt, padded on the left.

    ``mask`` and ``opening`` are [prompts, length]; ``tails`` is [prompts, plan.tail]; ``row`` maps
    an index into `Plan.prompts` to a row.
    """

    cache: DynamicCache
    mask: Tensor
    opening: Tensor
    tails: Tensor
    row: dict[int, int]

    def rows(self, cells: Sequence[CellPlan], key: str) -> list[int]:
        return [self.row[cell.prompts[key]] for cell in cells]

    def select(self, rows: Tensor, first_layer: int = 0) -> DynamicCache:
        """A cache of its own for `rows`; layers below `first_layer` are skipped, so not copied."""
        return _select_rows(self.cache, rows, first_layer)


def _select_rows(cache: DynamicCache, rows: Tensor, first_layer: int = 0) -> DynamicCache:
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers[first_layer:]:
        assert isinstance(layer, DynamicLayer)  # _prefill has refused all others
        assert layer.keys is not None
        assert layer.values is not None
        layer.keys = layer.keys.index_select(0, rows.to(layer.keys.device))
        layer.values = layer.values.index_select(0, rows.to(layer.values.device))
    return chosen


def _prefill(lm: Any, tree: ModuleTree, plan: Plan, prompts: list[int]) -> _Prefix:
    device = lm.device
    openings = [plan.prompts[index].ids[: -plan.tail] for index in prompts]
    length = max(map(len, openings))
    opening = torch.tensor(
        [[plan.pad_id] * (length - len(ids)) + list(ids) for ids in openings], device=device
    )
    mask = torch.tensor(
        [[0] * (length - len(ids)) + [1] * len(ids) for ids in openings], device=device
    )
    tails = torch.tensor(
        [plan.prompts[index].ids[-plan.tail :] for index in prompts], device=device
    )
    with lm.trace(
        input_ids=opening,
        attention_mask=mask,
        position_ids=_position_ids(mask),
        use_cache=True,
        logits_to_keep=1,
    ):
        cache = nnsight.save(lm.output.past_key_values)
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin) or not isinstance(layer, DynamicLayer):
            raise PersonaError(
                f"This model keeps a {type(layer).__name__} between tokens, which cannot be shared "
                "by the rows of a batch; only models whose every layer has ordinary or "
                "sliding-window attention are supported."
            )
    return _Prefix(cache, mask, opening, tails, {index: row for row, index in enumerate(prompts)})


def _position_ids(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


# --- record ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """Residuals of the clean runs and XY's continuation, for one chunk of cells.

    ``residuals``: by key, float32 [cells, positions, layers, d_model]; ``continuations``: int
    [cells, reference_tokens], meaningless after ``lengths`` [cells].
    """

    residuals: dict[str, Tensor]
    continuations: Tensor
    lengths: Tensor


def _record(
    lm: Any, tree: ModuleTree, plan: Plan, cells: Sequence[CellPlan], prefix: _Prefix
) -> _Record:
    device = lm.device
    layers = lm.get(tree.layers)
    keys = ["XY", *(key for key in plan.roles if key != "XY")]
    n_cells, n_keys = len(cells), len(keys)
    rows = torch.tensor([row for key in keys for row in prefix.rows(cells, key)], device=device)
    offsets = _tail_offsets(
        plan, [plan.prompts[cell.prompts[key]] for key in keys for cell in cells]
    )
    every = torch.arange(len(rows), device=device)
    steps = plan.last_generated + 1
    cache = prefix.select(rows)
    with lm.generate(
        input_ids=torch.cat([prefix.opening[rows], prefix.tails[rows]], dim=1),
        attention_mask=_grown_mask(prefix.mask[rows], plan.tail),
        past_key_values=cache,
        max_new_tokens=steps,
        pad_token_id=plan.pad_id,
        **_GREEDY,
    ) as tracer:
        reads = nnsight.save([])
        for step in tracer.iter[:steps]:
            names = [name for name in plan.positions if _decode_step(name) == step]
            for layer in plan.layers:
                for name in names:
                    hidden = layers[layer].input
                    where = offsets[name].to(hidden.device) if step == 0 else -1
                    read = hidden[every.to(hidden.device), where]
                    reads.append((name, layer, read.float().to(device)))
            logits = lm.output.logits
            logits[n_cells:, -1] = logits[:n_cells, -1].repeat(n_keys - 1, 1)
        ids = nnsight.save(tracer.result)
    continuations = ids[:n_cells, -steps:]
    if plan.window > 1:
        own = torch.arange(n_cells, device=device)
        with lm.generate(
            input_ids=ids[:n_cells],
            attention_mask=_grown_mask(prefix.mask[rows[:n_cells]], plan.tail + steps),
            past_key_values=_select_rows(cache, own),
            max_new_tokens=plan.window - 1,
            pad_token_id=plan.pad_id,
            **_GREEDY,
        ) as tracer:
            more = nnsight.save(tracer.result)
        continuations = torch.cat([continuations, more[:, -(plan.window - 1) :]], dim=1)
    found = {(name, layer): read for name, layer, read in reads}
    stacked = torch.stack(
        [
            torch.stack([found[name, layer] for layer in plan.layers], dim=1)
            for name in plan.positions
        ],
        dim=1,
    ).reshape(n_keys, n_cells, len(plan.positions), len(plan.layers), -1)
    lengths = _lengths(continuations, plan.eos_ids)
    record = _Record(dict(zip(keys, stacked, strict=True)), continuations, lengths)
    _check_residuals(record, plan, cells, lm._module.dtype)
    return record


def _decode_step(position: str) -> int:
    """The forward of a decode in which a position's token is fed: 0 is the prompt's own."""
    return generated_index(position)


def _tail_offsets(plan: Plan, prompts: Sequence[Any]) -> dict[str, Tensor]:
    """Index of every prompt position within the tail, int [prompts]."""
    start = [len(prompt.ids) - plan.tail for prompt in prompts]
    return {
        "p_last": torch.full((len(prompts),), plan.tail - 1),
        "p_user_last": torch.tensor(
            [prompt.user_last - first for prompt, first in zip(prompts, start, strict=True)]
        ),
    }


def _grown_mask(mask: Tensor, n: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), n)], dim=1)


def _lengths(continuations: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
    """Tokens up to and including the first end-of-sequence token, int [rows]."""
    eos = torch.tensor(eos_ids, dtype=continuations.dtype, device=continuations.device)
    ended = torch.isin(continuations, eos)
    full = torch.full((len(ended),), ended.shape[1], device=ended.device)
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, full)


def _exists(record: _Record, plan: Plan) -> Tensor:
    """Whether each cell's continuation reaches each position, bool [cells, positions]."""
    needed = torch.tensor(
        [generated_index(name) for name in plan.positions], device=record.lengths.device
    )
    return record.lengths[:, None] >= needed


def _public_residuals(record: _Record, plan: Plan) -> dict[str, Tensor]:
    missing = ~_exists(record, plan)[:, :, None, None]
    return {
        key: value.masked_fill(missing, torch.nan).cpu() for key, value in record.residuals.items()
    }


def _check_residuals(
    record: _Record, plan: Plan, cells: Sequence[CellPlan], dtype: torch.dtype
) -> None:
    exists = _exists(record, plan)[:, :, None]
    for key, value in record.residuals.items():
        bad = (~value.isfinite().all(-1) & exists).nonzero()
        if len(bad):
            cell, position, layer = bad[0].tolist()
            what = _residual_of(key, cells[cell])
            raise _not_finite(what, plan.layers[layer], plan.positions[position], dtype)


def _residual_of(key: str, cell: CellPlan) -> str:
    return f"The residual of the {key} prompt of cell {cell.persona}/{cell.task}"


def _not_finite(what: str, layer: int, position: str, dtype: torch.dtype) -> PersonaError:
    """The error for a value that overflowed or is not a number."""
    name = str(dtype).removeprefix("torch.")
    way_out = "use --dtype float32" if dtype == torch.bfloat16 else "use --dtype bfloat16"
    if dtype == torch.float32:
        way_out = "check the weights, which also overflow in bfloat16"
    return PersonaError(
        f"{what} is not finite at layer {layer}, position {position} in {name}; {way_out}."
    )


# --- extend ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HostRun:
    """One unedited run of a host prompt over the clean continuation.

    ``logprobs``: float32 [cells, reference_tokens, vocab], predicting the continuation's tokens;
    ``residuals``: by layer, [cells, tail + reference_tokens - 1, d_model] in the model's dtype.
    """

    key: str
    logprobs: Tensor
    residuals: dict[int, Tensor]


def _continuation_inputs(
    plan: Plan, prefix: _Prefix, rows: Tensor, continuations: Tensor, fed: int, first_layer: int
) -> dict[str, Any]:
    """Arguments of a forward over the first `fed` tokens of tail and continuation."""
    mask = _grown_mask(prefix.mask[rows], fed)
    return {
        "input_ids": torch.cat([prefix.tails[rows], continuations], dim=1)[:, :fed],
        "attention_mask": mask,
        "position_ids": _position_ids(mask)[:, -fed:],
        "past_key_values": prefix.select(rows, first_layer),
        "use_cache": True,
    }


def _extend(
    lm: Any,
    tree: ModuleTree,
    plan: Plan,
    cells: Sequence[CellPlan],
    key: str,
    prefix: _Prefix,
    record: _Record,
) -> _HostRun:
    layers = lm.get(tree.layers)
    rows = torch.tensor(prefix.rows(cells, key), device=lm.device)
    fed = plan.tail + plan.reference_tokens - 1
    entries = sorted({_entry_layer(plan, edit) for edit in plan.edits})
    with lm.trace(
        **_continuation_inputs(plan, prefix, rows, record.continuations, fed, 0),
        logits_to_keep=plan.reference_tokens,
    ):
        residuals = nnsight.save({})
        for layer in entries:
            residuals[layer] = layers[layer].input.clone()
        logprobs = nnsight.save(lm.output.logits.float().log_softmax(-1))
    for cell, length in enumerate(record.lengths.tolist()):
        if logprobs[cell, :length].isnan().any():
            alone = torch.tensor([cell], device=lm.device)
            inputs = _continuation_inputs(
                plan, prefix, rows[alone], record.continuations[alone], fed, 0
            )
            layer, position = _first_not_finite(lm, tree, plan, inputs)
            what = _residual_of(key, cells[cell])
            raise _not_finite(what, layer, position, lm._module.dtype)
    return _HostRun(key, logprobs, residuals)


def _first_not_finite(
    lm: Any, tree: ModuleTree, plan: Plan, inputs: dict[str, Any]
) -> tuple[int, str]:
    """The lowest layer whose input is not finite, and where in the fed tokens it is so first.

    When every layer's input is finite the last layer's own output overflows: it is named instead.
    """
    with lm.trace(**inputs):
        finite = nnsight.save([])
        for layer in lm.get(tree.layers):
            finite.append(layer.input[0].isfinite().all(-1))
    for number, row in enumerate(finite):
        if not row.all():
            k = int((~row).int().argmax()) - plan.tail + 1
            return number, f"g{k}" if k > 0 else "p_last" if k == 0 else f"p_last{k}"
    return tree.n_layers - 1, "p_last"


def _entry_layer(plan: Plan, edit: Edit) -> int:
    """The layer at which stored residuals enter: everything below is as in the unedited run."""
    return min(edit.layers) if edit.layers else max(plan.layers)


# --- score -----------------------------------------------------------------------------------


def _edit_groups(plan: Plan) -> list[list[int]]:
    """Edits that can share a batch: the same layers and position."""
    groups: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for index, edit in enumerate(plan.edits):
        groups.setdefault((edit.layers, edit.position), []).append(index)
    return list(groups.values())


def _batches(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _vectors(
    plan: Plan, cells: Sequence[CellPlan], record: _Record, batch: Sequence[tuple[int, int]]
) -> dict[int, Tensor]:
    """What each row writes, by layer: float32 [rows, d_model]. All edits share site and layers."""
    edit = plan.edits[batch[0][1]]
    if not edit.layers:
        return {}
    position = plan.positions.index(edit.position)
    columns = [plan.layers.index(layer) for layer in edit.layers]
    vectors = []
    for cell, index in batch:
        h = {key: value[cell, position, columns] for key, value in record.residuals.items()}
        condition = plan.edits[index].condition
        noise = None
        if condition == "random":
            noise = torch.stack(
                [
                    seeded_noise(cells[cell].seed, edit.position, layer, h["XY"].shape[-1])
                    for layer in edit.layers
                ]
            ).to(h["XY"].device)
        vectors.append(edit_vector(condition, h, noise))
    return dict(zip(edit.layers, torch.stack(vectors, dim=1), strict=True))


def _score(
    lm: Any,
    tree: ModuleTree,
    plan: Plan,
    cells: Sequence[CellPlan],
    prefix: _Prefix,
    record: _Record,
    clean: Tensor,
    host: _HostRun,
    batch: Sequence[tuple[int, int]],
) -> list[tuple[float, int]]:
    """KL and number of tokens of each row (cell, edit); all edits share site and layers."""
    device = lm.device
    layers = lm.get(tree.layers)
    edit = plan.edits[batch[0][1]]
    entry = _entry_layer(plan, edit)
    k = generated_index(edit.position)
    fed = fed_tokens(plan, edit.position)
    of_cell = torch.tensor([cell for cell, _ in batch], device=device)
    in_batch = torch.arange(len(batch), device=device)
    members = [cells[cell] for cell, _ in batch]
    prompts = [plan.prompts[cell.prompts[host.key]] for cell in members]
    rows = torch.tensor(prefix.rows(members, host.key), device=device)
    if k == 0:
        offset = _tail_offsets(plan, prompts)[edit.position].to(device)
    else:
        offset = torch.full_like(of_cell, plan.tail - 1 + k)
    stored = host.residuals[entry]
    feed = stored[of_cell.to(stored.device), :fed]
    vectors = _vectors(plan, cells, record, batch)
    if entry in vectors:
        where = (in_batch.to(feed.device), offset.to(feed.device))
        feed[where] = vectors.pop(entry).to(feed.device, feed.dtype)
    n_tokens = (record.lengths[of_cell] - k).clamp(0, plan.window)
    with lm.trace(
        **_continuation_inputs(
            plan, prefix, rows, record.continuations[of_cell], fed, first_layer=entry
        ),
        logits_to_keep=plan.window,
    ):
        for skipped in layers[:entry]:
            skipped.skip(feed)
        layers[entry].input = feed
        for layer, vector in vectors.items():
            hidden = layers[layer].input
            hidden[in_batch.to(hidden.device), offset.to(hidden.device)] = vector.to(
                hidden.device, hidden.dtype
            )
        kl = nnsight.save(
            window_kl(clean[of_cell, k : k + plan.window], lm.output.logits, n_tokens)
        )
    counts = n_tokens.tolist()
    for (cell, index), value, count in zip(batch, kl.tolist(), counts, strict=True):
        if count and not abs(value) < float("inf"):
            name = f"{cells[cell].persona}/{cells[cell].task}"
            what = f"The output of cell {name} under {plan.edits[index].condition!r}"
            raise _not_finite(what, entry, edit.position, lm._module.dtype)
    return list(zip(kl.tolist(), counts, strict=True))


# --- write -----------------------------------------------------------------------------------


def _write(
    lm: Any,
    tree: ModuleTree,
    plan: Plan,
    cells: Sequence[CellPlan],
    prefix: _Prefix,
    record: _Record,
    batch: Sequence[tuple[int, int | None]],
) -> list[tuple[int, ...]]:
    """Greedy token ids of each row (cell, edit or None for the unedited XY prompt)."""
    device = lm.device
    layers = lm.get(tree.layers)
    members = [cells[cell] for cell, _ in batch]
    keys = ["XY" if edit is None else plan.host for _, edit in batch]
    prompts = [plan.prompts[cell.prompts[key]] for cell, key in zip(members, keys, strict=True)]
    offsets = _tail_offsets(plan, prompts)
    rows = torch.tensor(
        [prefix.row[cell.prompts[key]] for cell, key in zip(members, keys, strict=True)],
        device=device,
    )
    # (decode step, layer) -> what is written there: row, index within the fed tokens, vector
    writes: dict[tuple[int, int], list[tuple[int, int, Tensor]]] = {}
    for row, (cell, edit) in enumerate(batch):
        if edit is not None:
            position = plan.edits[edit].position
            step = _decode_step(position)
            where = int(offsets[position][row]) if step == 0 else 0
            for layer, vector in _vectors(plan, cells, record, [(cell, edit)]).items():
                writes.setdefault((step, layer), []).append((row, where, vector[0]))
    steps = min(max((step for step, _ in writes), default=-1) + 1, plan.generate)
    with lm.generate(
        input_ids=torch.cat([prefix.opening[rows], prefix.tails[rows]], dim=1),
        attention_mask=_grown_mask(prefix.mask[rows], plan.tail),
        past_key_values=prefix.select(rows),
        max_new_tokens=plan.generate,
        pad_token_id=plan.pad_id,
        **_GREEDY,
    ) as tracer:
        for step in tracer.iter[:steps]:
            for layer in plan.layers:
                for row, where, vector in writes.get((step, layer), ()):
                    hidden = layers[layer].input
                    hidden[row, where] = vector.to(hidden.device, hidden.dtype)
        ids = nnsight.save(tracer.result)
    tokens = ids[:, -plan.generate :]
    lengths = _lengths(tokens, plan.eos_ids)
    return [
        tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
