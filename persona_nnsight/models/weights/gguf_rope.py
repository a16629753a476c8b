"""What a GGUF file says of rotary positions, put into a transformers configuration.

A file gives the turn of each pair of dimensions by a base, by a kind of scaling, and by tensors of
factors; transformers' loader reads the base alone. Here the turns are worked out as llama.cpp does,
a configuration is looked for that gives the same, and what the model then computes is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FACTORS = "rope_freqs.weight"
"""What each pair's turn is divided by, whatever the length (Llama 3)."""
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
"""The same up to the original context length, and beyond it (Phi 3)."""

USED = frozenset(
    {
        *("dimension_count", "dimension_count_swa", "freq_base", "freq_base_swa"),
        *("scale_linear", "scaling.type"),
        *("scaling.factor", "scaling.attn_factor", "scaling.original_context_length"),
        *("scaling.yarn_ext_factor", "scaling.yarn_attn_factor"),
        *("scaling.yarn_beta_fast", "scaling.yarn_beta_slow"),
    }
)
"""The keys below `rope` that are used here."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
_SAME = 1e-5  # relative; rounding to float32 makes a hundredth of it


@dataclass(frozen=True)
class Rotation:
    """How positions turn queries and keys.

    Attributes:
        turns: radians by position of each pair of dimensions, float64 [pairs].
        amplitude: factor of cosines and sines.
    """

    turns: Tensor
    amplitude: float

    def is_same(self, other: Rotation) -> bool:
        """Whether two turn alike, but for rounding."""
        return (
            self.turns.shape == other.turns.shape
            and torch.allclose(self.turns, other.turns, rtol=_SAME, atol=1e-12)
            and math.isclose(self.amplitude, other.amplitude, rel_tol=_SAME)
        )


@dataclass(frozen=True)
class Said:
    """What a file says of the rotation of its layers with full attention.

    Attributes:
        pairs: how many pairs of dimensions turn.
        base: of the turns before any scaling.
        kind: ``none``, ``linear``, ``yarn`` or ``longrope``.
        scale: by how much positions are stretched; 1 where they are not.
        context: tokens of context before the stretching.
        short, long: factors of pairs up to and beyond `context`; None where there are none.
        amplitude: factor of cosines and sines, but for what yarn adds.
        beta_fast, beta_slow, extrapolation: of yarn.
    """

    pairs: int
    base: float
    kind: str
    scale: float
    context: int
    short: tuple[float, ...] | None
    long: tuple[float, ...] | None
    amplitude: float
    beta_fast: float
    beta_slow: float
    extrapolation: float

    def rotation(self, *, truncate: bool = True) -> Rotation:
        """How positions turn up to the original context length; `truncate` is yarn's."""
        turns = _unscaled(self.base, self.pairs)
        if self.short is not None:
            turns = turns / torch.tensor(self.short, dtype=torch.float64)
        stretched = turns / self.scale
        if self.kind != "yarn" or not self.extrapolation:
            return Rotation(stretched, self.amplitude)
        kept = self._kept(truncate) * self.extrapolation
        amplitude = self.amplitude * (1 + 0.1 * math.log(self.scale))
        return Rotation(stretched * (1 - kept) + turns * kept, amplitude)

    def _kept(self, truncate: bool) -> Tensor:
        """Yarn's share of each pair's turn that is not stretched."""

        def at(turns: float) -> float:
            wave = math.log(self.context / (turns * 2 * math.pi))
            return self.pairs * wave / math.log(self.base)

        low, high = at(self.beta_fast), at(self.beta_slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * self.pairs - 1)
        ramp = (torch.arange(self.pairs, dtype=torch.float64) - low) / max(high - low, 0.001)
        return 1 - ramp.clamp(0, 1)

    def parameters(self) -> Iterator[dict[str, Any]]:
        """Parameters by which transformers may turn alike: the usual kind first, then any turns."""
        unscaled = _unscaled(self.base, self.pairs)
        if self.kind == "yarn" and self.short is None:
            yarn: dict[str, Any] = {"rope_type": "yarn", "factor": self.scale}
            if (self.beta_fast, self.beta_slow) != (32, 1):
                yarn |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
            if self.amplitude != 1:
                yarn["attention_factor"] = self.rotation().amplitude
            yield yarn | {"original_max_position_embeddings": self.context}
        elif self.short is None and self.scale == 1:
            yield {"rope_type": "default"}
        elif self.short is None:
            yield {"rope_type": "linear", "factor": self.scale}
        elif self.short == self.long and (fitted := _llama3(unscaled, self.short)):
            yield {"rope_type": "llama3", **fitted}
        wanted = self.rotation()
        short = unscaled / wanted.turns
        more = torch.ones_like(short)
        if self.short is not None and self.long is not None:
            more = torch.tensor(self.long).double() / torch.tensor(self.short).double()
        yield {
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": (short * more).tolist(),
            "attention_factor": wanted.amplitude,
            "original_max_position_embeddings": self.context,
        }


def _unscaled(base: float, pairs: int) -> Tensor:
    return torch.tensor(base, dtype=torch.float64) ** -(torch.arange(pairs).double() / pairs)


def said(rope: Mapping[str, Any], factors: Mapping[str, Tensor], config: PreTrainedConfig) -> Said:
    """Gather what a file says, with llama.cpp's defaults.

    Args:
        rope: the values of its keys below ``rope``.
        factors: its tensors of factors, by their names.
        config: what transformers made of its other keys.

    Raises:
        ValueError: tensors of factors that do not belong together, or to so many pairs.
    """
    head = _head_width(config)
    short, long = (factors.get(FACTORS, factors.get(name)) for name in (SHORT, LONG))
    pairs = int(rope.get("dimension_count", head)) // 2
    if (short is None) != (long is None) or (FACTORS in factors and len(factors) > 1):
        raise ValueError("tensors of factors that do not belong together")
    if any(len(each) != pairs for each in factors.values()):
        raise ValueError("factors of another number of pairs")
    scale = float(rope.get("scaling.factor", rope.get("scale_linear", 0)))
    kind = str(rope.get("scaling.type", "linear"))
    extrapolation = float(rope.get("scaling.yarn_ext_factor", -1))
    return Said(
        pairs=pairs,
        base=float(rope.get("freq_base", 10000)),
        kind=kind,
        scale=1.0 if kind == "none" or not scale else scale,
        context=int(rope.get("scaling.original_context_length", config.max_position_embeddings)),
        short=None if short is None else tuple(short.double().tolist()),
        long=None if long is None else tuple(long.double().tolist()),
        amplitude=float(rope.get("scaling.attn_factor", 1))
        * float(rope.get("scaling.yarn_attn_factor", 1)),
        beta_fast=float(rope.get("scaling.yarn_beta_fast", 32)),
        beta_slow=float(rope.get("scaling.yarn_beta_slow", 1)),
        extrapolation=1.0 if extrapolation < 0 else extrapolation,
    )


def turned_alike(
    config: PreTrainedConfig, rope: Mapping[str, Any], factors: Mapping[str, Tensor]
) -> PreTrainedConfig | None:
    """A configuration whose model turns queries and keys as a file says; None where there is none.

    Args:
        config: what transformers made of the file.
        rope: the values of the file's keys below ``rope``.
        factors: its tensors of factors, by their names.
    """
    if not _rotations(config):
        return None if rope or factors else config
    try:
        wanted = said(rope, factors, config)
    except ValueError:
        return None
    if _turns(config, wanted, rope):
        return config
    for parameters in wanted.parameters():
        try:
            found = _with(config, wanted, parameters, rope)
            if _turns(found, wanted, rope) and _takes_pairs(config, wanted):
                return found
        except Exception:  # a configuration that takes no such parameters
            continue
    return None


def _head_width(config: PreTrainedConfig) -> int:
    own = config.to_dict().get("head_dim")
    return int(own or config.hidden_size // config.num_attention_heads)


def _llama3(unscaled: Tensor, factors: Sequence[float]) -> dict[str, float] | None:
    """Llama 3's parameters that give these factors, if two pairs are between its bounds.

    One of its four is free: what counts are wave lengths, in units of the original context.
    """
    factor = max(factors)
    if factor <= 1:
        return None
    shares = (1 / torch.tensor(factors, dtype=torch.float64) - 1 / factor) / (1 - 1 / factor)
    between = [pair for pair, share in enumerate(shares.tolist()) if 1e-5 < share < 1 - 1e-5]
    if len(between) < 2:
        return None
    first, last = between[0], between[-1]
    waves = unscaled / (2 * math.pi)  # by position
    slope = float((shares[first] - shares[last]) / (waves[first] - waves[last]))
    offset = float(shares[first] - slope * waves[first])
    if offset >= 0:
        return None
    high = _rounded(1 - 1 / offset)
    return {
        "factor": _rounded(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": round(slope * (high - 1)),
    }


def _rounded(value: float) -> float:
    """A number as somebody wrote it, before its rounding to float32."""
    whole = float(round(value))
    return whole if math.isclose(value, whole, rel_tol=1e-4) else value


def _with(
    config: PreTrainedConfig, wanted: Said, parameters: Mapping[str, Any], rope: Mapping[str, Any]
) -> PreTrainedConfig:
    settings, head = config.to_dict(), _head_width(config)
    new = {"rope_theta": wanted.base, **parameters}
    if "partial_rotary_factor" in settings or 2 * wanted.pairs != head:
        new["partial_rotary_factor"] = 2 * wanted.pairs / head
        settings["partial_rotary_factor"] = new["partial_rotary_factor"]
    context = "original_max_position_embeddings"
    if context in settings and context in parameters:  # Phi 3 has it in both places
        settings[context] = parameters[context]
    old = settings["rope_parameters"]
    if _FULL in old:
        settings["rope_parameters"] = old | {_FULL: new}
        if "freq_base_swa" in rope:
            sliding = {**old[_SLIDING], "rope_theta": float(rope["freq_base_swa"])}
            settings["rope_parameters"][_SLIDING] = sliding
    else:
        settings["rope_parameters"] = new
    return type(config)(**settings)


def _takes_pairs(config: PreTrainedConfig, wanted: Said) -> bool:
    """Whether this kind of model can leave the rest of each head as it is.

    transformers works out turns of any kind for as many pairs as are asked for; the model's own, of
    the default kind, are those that it can use.
    """
    found = _rotations(_with(config, wanted, {"rope_type": "default"}, {}))
    return len(found.get(_FULL, found.get("", next(iter(found.values())))).turns) == wanted.pairs


def _turns(config: PreTrainedConfig, wanted: Said, rope: Mapping[str, Any]) -> bool:
    """Whether a model of this configuration turns as wanted, at its sliding layers too."""
    found = _rotations(config)
    own = found.get(_FULL, found.get(""))
    # Where all layers slide, what is said of the others does nothing.
    if own and not any(own.is_same(wanted.rotation(truncate=each)) for each in (True, False)):
        return False
    sliding = found.get(_SLIDING, found.get(""))
    if sliding is None:
        return not rope.keys() & {"freq_base_swa", "dimension_count_swa"}
    pairs = len(sliding.turns)
    if rope.get("dimension_count_swa", 2 * pairs) != 2 * pairs:
        return False
    if "freq_base_swa" not in rope:
        return True
    return sliding.is_same(Rotation(_unscaled(float(rope["freq_base_swa"]), pairs), 1))


def _rotations(config: PreTrainedConfig) -> dict[str, Rotation]:
    """How a model of this configuration turns, by the kind of layer; "" where all are alike."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    ending = "inv_freq"
    for module in model.modules():
        names = [name for name, _ in module.named_buffers(recurse=False) if name.endswith(ending)]
        if names:
            real = type(module)(config)
            return {
                name.removesuffix(ending).rstrip("_"): Rotation(
                    getattr(real, name).double(),
                    float(getattr(real, name.removesuffix(ending) + "attention_scaling", 1)),
                )
                for name in names
                if "original" not in name
            }
    return {}
