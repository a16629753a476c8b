"""What the unedited role prompt predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.decode import Decoded
from persona_nnsight.engine.finite import edited_not_finite, output_not_finite
from persona_nnsight.method.kl import window_kl
from persona_nnsight.models.module_tree import has_few_bits
from persona_nnsight.plan.plan import Edit


@dataclass(frozen=True)
class Clean:
    """What the unedited role prompt predicts, which every KL is taken from.

    Attributes:
        logprobs: of the continuation's tokens, float32 [cells, reference_tokens, vocab].
        probs: their exponentials, which cost as much as the rest of a KL if taken for every row.
    """

    logprobs: Tensor
    probs: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Clean:
        """What logits of any dtype predict."""
        logprobs = logits.float().log_softmax(-1)
        return cls(logprobs, logprobs.exp())


def check_clean(chunk: Chunk, decoded: Decoded, clean: Clean) -> None:
    """Refuse logits of the unedited role prompt that are not numbers.

    Raises:
        PersonaError: says where they come from.
    """
    for cell, length in enumerate(decoded.lengths.tolist()):
        if clean.logprobs[cell, :length].isnan().any():
            raise output_not_finite(chunk, "XY", cell, decoded.continuations[cell])


def has_own_reference(chunk: Chunk, edit: Edit) -> bool:
    """Whether a batch of such edits holds the unedited rows that its KLs are taken from."""
    return has_few_bits(chunk.dtype) and edit.host == "XY" and not edit.is_unedited


def references(chunk: Chunk, edit: Edit, cells: Sequence[int]) -> list[int]:
    """The cells, each once, whose unedited rows stand at the end of a batch of such edits."""
    return list(dict.fromkeys(cells)) if has_own_reference(chunk, edit) else []


def batch_kl(
    clean: Clean,
    logits: Tensor,
    cells: Sequence[int],
    beside: Sequence[int],
    window: slice,
    n_tokens: Tensor,
) -> Tensor:
    """KL of the rows of a batch, float32 [rows].

    Args:
        clean: what XY predicts.
        logits: of the rows and of those `beside` them, [rows + beside, window, vocab].
        cells: of each row, its cell within the chunk.
        beside: `references`.
        window: of the continuation's tokens.
        n_tokens: how many of them exist, int [rows].
    """
    reference, against = clean, cells
    if beside:
        reference, window = Clean.of(logits[len(cells) :]), slice(None)
        against = [beside.index(cell) for cell in cells]
    return window_kl(
        reference.logprobs[:, window],
        reference.probs[:, window],
        logits[: len(cells)],
        against,
        n_tokens,
    )


def checked_scores(
    chunk: Chunk,
    decoded: Decoded,
    batch: Sequence[tuple[int, int]],
    kl: Sequence[float],
    n_tokens: Sequence[int],
) -> list[tuple[float, int]]:
    """KLs and their numbers of tokens, row by row.

    Raises:
        PersonaError: a KL of some tokens that is not finite.
    """
    results = list(zip(kl, n_tokens, strict=True))
    for (cell, index), (value, count) in zip(batch, results, strict=True):
        if count and not math.isfinite(value):
            raise edited_not_finite(chunk, cell, index, decoded.continuations[cell])
    return results
