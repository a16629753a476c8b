"""What a GGUF file says beside its tensors, put into a transformers configuration or refused.

transformers' loader reads the keys it knows of an architecture and passes over the rest. Here every
key below the architecture's name is compared with what the configuration then holds: it is the
same, it is put there, it says nothing, or the file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_nnsight.errors import PersonaError, quoted
from persona_nnsight.models.weights import gguf_rope

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

#: By key: what configurations call the same, the most specific name first.
_NAMES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("ffn_hidden_size", "n_inner", "intermediate_size"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "use_parallel_residual": ("use_parallel_residual", "parallel_attn"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_kv_heads", "num_key_value_heads"),
    "attention.key_length": ("global_head_dim", "head_dim"),
    "attention.value_length": ("v_head_dim", "global_head_dim", "head_dim"),
    "attention.key_length_swa": ("head_dim",),
    "attention.value_length_swa": ("head_dim",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": (
        *("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    ),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_shared_count": ("n_shared_experts",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_gating_func": ("scoring_func",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "nextn_predict_layers": ("num_nextn_predict_layers",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
}

#: By key: values that ask for nothing, where a configuration has no name for it.
_NOTHING: dict[str, tuple[object, ...]] = {
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.causal": (True,),
    "attention.shared_kv_layers": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_weights_norm": (False,),
    "expert_gating_func": ("softmax",),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "ssm.dt_b_c_rms": (False,),
}

#: Parts that a model without attention or without an MLP (Mamba) has none of.
_ABSENT = frozenset({"feed_forward_length", "attention.head_count"})

#: Keys that say nothing of the hidden states of a language model.
_NOTES = frozenset({"pooling_type", "rope.scaling.finetuned"})

#: Key spaces that say nothing of them either; those that nobody's format knows may be notes, too.
_HARMLESS_SPACES = frozenset({"GGUF", "general", "imatrix", "split", "tokenizer"})

_GATES = {0: "none", 1: "softmax", 2: "sigmoid"}
_QUERY_SCALE = "query_pre_attn_scalar"


def metadata_of(reader: Any) -> dict[str, Any]:
    """The keys and values of a GGUF file, without its tokenizer's, which take long to read."""
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("tokenizer.")
    }


def read_by_transformers(gguf: Path) -> Collection[str]:
    """The keys that transformers answers for, of the architectures that it loads in its newer way.

    Of the others it reads what a table names, not always into what the model computes with.
    """
    from transformers.integrations.gguf import (
        GGUF_CONFIG_ARCHS,
        get_gguf_config,
        read_gguf_metadata,
    )

    metadata, tensors = read_gguf_metadata(str(gguf))
    if metadata["general.architecture"] not in GGUF_CONFIG_ARCHS:
        return ()
    noted = _Noted(metadata)
    get_gguf_config(noted, tensors)
    return noted.read


class _Noted(dict[str, Any]):
    """A dictionary that knows which of its keys were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def as_the_file_says(
    config: PreTrainedConfig,
    metadata: Mapping[str, Any],
    read: Collection[str],
    factors: Mapping[str, Tensor],
    gguf: str,
) -> PreTrainedConfig:
    """The configuration of a file, with what transformers' loader passes over.

    Args:
        config: what that loader made of the file.
        metadata: the file's keys and their values; those of its tokenizer may be left out.
        read: the keys that the loader itself answers for.
        factors: the tensors of rotary factors, by their names.
        gguf: how messages name the file.

    Raises:
        PersonaError: a key or a tensor that says what this kind of configuration cannot hold.
    """
    architecture = str(metadata["general.architecture"])
    _refuse_other_spaces(metadata, architecture, gguf)
    prefix = f"{architecture}."
    own = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and key.removeprefix(prefix) not in _NOTES
    }
    rope = {
        key.removeprefix("rope."): value
        for key, value in own.items()
        if key.removeprefix("rope.") in gguf_rope.USED
    }
    others = {
        key: value
        for key, value in own.items()
        if key.removeprefix("rope.") not in rope and prefix + key not in read
    }
    changed: dict[str, Any] = {}
    for key, value in others.items():
        new = _setting(key, value, others, config)
        if new is None:
            raise _refused(gguf, prefix + key, value, config)
        changed |= new
    if _QUERY_SCALE in config.to_dict():
        changed[_QUERY_SCALE] = _query_scale(config.to_dict() | changed)
    config = type(config)(**config.to_dict() | changed)
    for key, value in others.items():  # two may want different values for one
        if _setting(key, value, others, config) != {}:
            raise _refused(gguf, prefix + key, value, config)
    turned = gguf_rope.turned_alike(config, rope, factors)
    if turned is None:
        names = [*factors, *(f"{prefix}rope.{key}" for key in rope if key.startswith("scal"))]
        names = names or [f"{prefix}rope.{key}" for key in rope]
        raise PersonaError(
            f"'{gguf}' says by {', '.join(names)} how positions turn queries and keys, which a "
            f"{type(config).__name__} cannot hold; use the model's safetensors from the hub."
        )
    return turned


def _refuse_other_spaces(metadata: Mapping[str, Any], architecture: str, gguf: str) -> None:
    """Refuse what is no language model, and keys that belong to a model of another architecture."""
    from gguf import MODEL_ARCH_NAMES, Keys

    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise PersonaError(
            f"'{gguf}' holds no model but is of the type {quoted(kind)} (general.type); give a "
            "file that holds a whole language model, and merge an adapter into it first."
        )
    if (parts := metadata.get("split.count", 1)) > 1:
        raise PersonaError(
            f"'{gguf}' is one of {parts} parts of a model (split.count); merge them into one file "
            "first (llama-gguf-split --merge)."
        )
    known = {*_spaces(Keys), *MODEL_ARCH_NAMES.values()}
    foreign = known - _HARMLESS_SPACES - {architecture}
    for key, value in metadata.items():
        if key.split(".")[0] in foreign:
            raise PersonaError(
                f"'{gguf}' (architecture {architecture!r}) says {key} = {quoted(value)}, which "
                "would be left out; use the model's safetensors from the hub."
            )


def _spaces(part: type) -> Iterator[str]:
    """What the keys begin with that a part of gguf's list of them holds."""
    for inner in vars(part).values():
        if isinstance(inner, type):
            yield from _spaces(inner)
        elif isinstance(inner, str) and "." in inner:
            yield inner.split(".")[0]


def _refused(gguf: str, key: str, value: object, config: PreTrainedConfig) -> PersonaError:
    return PersonaError(
        f"'{gguf}' says {key} = {quoted(value)}, which a {type(config).__name__} cannot hold; use "
        "the model's safetensors from the hub."
    )


def _setting(
    key: str, value: Any, others: Mapping[str, Any], config: PreTrainedConfig
) -> dict[str, Any] | None:
    """What a key asks to be changed in a configuration; None where it cannot be."""
    settings = config.to_dict()
    heads = config.num_attention_heads if hasattr(config, "num_attention_heads") else 0
    if key == "expert_gating_func":
        value = _GATES.get(value, value)
    elif key == "attention.sliding_window_pattern":
        return _layer_types(value, settings)
    elif key == "tensor_data_layout":
        return _layout(value, others)
    elif key in _ABSENT and not value:
        return {}
    name = next((name for name in _NAMES.get(key, ()) if name in settings), None)
    if name is not None:
        layers = (settings.get("per_layer_config") or {}).values()
        held = [settings[name], *(layer[name] for layer in layers if name in layer)]
        return {} if any(_is_same(each, value) for each in held) else {name: value}
    if key == "context_length":  # no setting, no limit
        return {}
    implied = {
        "attention.key_length": heads and config.hidden_size // heads,
        "attention.value_length": heads and config.hidden_size // heads,
        "attention.head_count_kv": heads,
        "attention.scale": heads
        and (settings.get("head_dim") or config.hidden_size // heads) ** -0.5,
        "feed_forward_length": 4 * config.hidden_size,
    }
    nothing = (*_NOTHING.get(key, ()), *([implied[key]] if key in implied else []))
    return {} if any(_is_same(value, each) for each in nothing) else None


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal, but for rounding to float32; a list is what all of it is."""
    for several, value in ((one, other), (other, one)):
        if isinstance(several, list) and not isinstance(value, list):
            # Layers of another kind have 0.
            return bool(several) and all(_is_same(each, value) for each in several if each)
    if isinstance(one, float | int) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _layer_types(pattern: Any, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which layers slide: said of each, or as every so many which is the one that does not."""
    if "layer_types" not in settings:
        return None
    n_layers = len(settings["layer_types"])
    if not isinstance(pattern, list):
        pattern = [bool(pattern) and (layer + 1) % pattern != 0 for layer in range(n_layers)]
    kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return {} if kinds == settings["layer_types"] else {"layer_types": kinds}


def _layout(value: Any, others: Mapping[str, Any]) -> dict[str, Any] | None:
    """Order of rows: that of Llama's original weights, which is undone, or Falcon's."""
    undone = value == "Meta AI original pth"
    same = value == "jploski" and others.get("attention.head_count_kv") == 1
    return {} if undone or same else None


def _query_scale(settings: Mapping[str, Any]) -> int:
    """What Gemma divides by the root of; no file says it, and llama.cpp knows the 27B models."""
    largest = {"gemma2": 46, "gemma3_text": 62}.get(settings["model_type"])
    if settings["num_hidden_layers"] == largest:
        return int(settings["hidden_size"] // settings["num_attention_heads"])
    return int(settings["head_dim"])
