"""Small configurations of every model type: sizes go by the names that families have for them.

A configuration is built from its class's defaults. What says how wide, how deep, how many is cut
down by name (`_SIZES`); what is listed layer by layer is cut so that every kind of layer is left;
the few model types whose parts have to fit in other ways are in `corrections`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from copy import deepcopy
from typing import Any

from tiny import IM_END_ID, IM_START_ID, PAD_ID, VOCAB_SIZE
from transformers import CONFIG_MAPPING, PreTrainedConfig

from architectures.corrections import CORRECTIONS

N_LAYERS = 5
VOCABULARY = 320
"""More rows than the tokenizer has tokens, as in many models; marks of images are among them."""

LONG, SHORT = 512, 24
"""Attention windows, in tokens: longer than the prompts, and shorter."""

_HEAD = 16
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|layers|depth|num_blocks", N_LAYERS),
    (r"(num_)?(en|de)coder_layers", N_LAYERS),
    (r"hidden_size_per_layer_input", 8),
    (r"(.*_)?(hidden_size|hidden_dim|embed_dim|embedding_size|embedding_dim|emb_dim)", 64),
    (r"(.*_)?projection_dim|d_model|n_embd|dim_model|attention_hidden_size", 64),
    (r"vision_output_dim|output_dim|output_proj_dims|projector_(in|out)put_dim", 64),
    (r"word_embed_proj_dim|lru_width|mm_embed_dim|audio_embed_dim", 64),
    (r"image_token_embed_dim|.*_proj_size|block_multiple_of|hidden_size_global|n_inner", 64),
    (r"moe_(shared_expert_)?intermediate_size|shared_(expert_)?intermediate_size", 32),
    (r"expert_ffn_hidden_size|share_expert_dim|dense_intermediate_size", 32),
    (r"(.*_)?(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|mlp_dim)", 96),
    (r"d_inner|dff|dim_ff|d_ff|feed_forward_size", 96),
    (r"(mamba_)?n_groups|mamba_ngroups", 2),
    (r"mamba_num_heads|mamba_n_heads|n_mamba_heads", 8),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|kv_n_heads|num_key_heads)", 2),
    (r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?|num_value_heads)", 4),
    (r"qk_(rope|nope)_head_dim|linear_(key|value)_head_dim|index_head_dim|rotary_dim", 8),
    (r"(.*_)?(head_dim|dim_head|d_head|d_kv|kv_channels|v_head_dim|head_size)", _HEAD),
    (r"(.*_)?(num_experts|num_local_experts|n_routed_experts)", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|moe_top_k|top_k_experts", 2),
    (r"n_group|topk_group", 1),
    (r"zero_expert_num", 2),
    (r"num_embeddings|codebook_size", 64),
    (r"(.*_)?(lora_rank|laurel_rank|norm_rank|adapter_rank|lowrank)", 16),
    (r"(.*_)?(d_state|state_size)", 8),
    (r"(.*_)?chunk_size|block_size", 16),
    (r"(base|latent|output|.*_out|.*_conv)_channels?", 32),
    (r"time_step_rank|mamba_dt_rank|d_rel", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers", 2),
    (r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length)", LONG),
    (r"max_(source|target)_positions", LONG),
    (r"(attn|expert)_layer_period", 2),
    (r"(attn|expert)_layer_offset", 1),
)
"""Names, and what is put there instead of a number; the first that fits."""

_WINDOW_NAMES = re.compile(
    r"sliding_window(_size)?|attention_chunk_size|window_size|local_attention"
    r"|attention_window_size|keep_window_size|index_topk"
)
_IDS = {
    **{"bos_token_id": IM_START_ID, "eos_token_id": IM_END_ID, "pad_token_id": PAD_ID},
    **dict.fromkeys(("forced_eos_token_id", "forced_bos_token_id"), None),
}
"""Of the tokenizer."""
_MARK = re.compile(r".*_token_(id|index)|.*_id")


def tiny_config(config_class: Any, window: int = LONG, **given: Any) -> PreTrainedConfig:
    """A small configuration.

    Args:
        config_class: of it.
        window: of attention layers that see no more than so many tokens.
        given: what it is to have, whatever else is said.
    """
    given = {**CORRECTIONS.get(config_class.model_type, {}), **given}
    parts = {name: dict(given.pop(name)) for name in config_class.sub_configs if name in given}
    typed = {
        name: tiny_config(CONFIG_MAPPING[kind], window, **part).to_dict()
        for name, part in parts.items()
        if (kind := part.pop("model_type", None)) is not None
    }
    defaults = _defaults(config_class, typed)
    is_text = "vocab_size" in defaults
    n_layers = _n_layers(defaults)
    mark = VOCAB_SIZE
    values: dict[str, Any] = {}
    for name, value in defaults.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = tiny_config(type(value), window, **parts.get(name, {}))
        elif name in _IDS:
            values[name] = _IDS[name]
        elif name == "head_dim":
            values[name] = _HEAD
        elif name == "rope_parameters" and "mrope_section" in _rope_keys(config_class):
            values[name] = {**value, "mrope_section": _sections(value)}
        elif value is None or isinstance(value, bool):
            continue
        elif _MARK.fullmatch(name) and isinstance(value, int):
            values[name] = mark
            mark += 1
        elif isinstance(value, list | tuple) and len(value) == n_layers:
            size = _size(name)
            values[name] = _every_kind(value) if size is None else [size] * N_LAYERS
        elif is_text and _WINDOW_NAMES.fullmatch(name):
            values[name] = window
        elif isinstance(value, int) and (size := _size(name)) is not None:
            values[name] = size
    if is_text and window == SHORT and {"use_sliding_window", "max_window_layers"} & {*defaults}:
        values["sliding_window"] = window
        values.pop("layer_types", None)  # they follow from it
    flags = {"use_sliding_window": window == SHORT, "is_decoder": True} if is_text else {}
    values |= {name: flag for name, flag in flags.items() if name in defaults}
    if "kv_lora_rank" in defaults and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= typed
    values |= {name: value(window) if callable(value) else value for name, value in given.items()}
    config: PreTrainedConfig = config_class(**values)
    return config


def _rope_keys(config_class: Any) -> Collection[str]:
    return getattr(config_class, "ignore_keys_at_rope_validation", None) or ()


def _sections(rope_parameters: dict[str, Any]) -> list[int]:
    """How many pairs of a head are turned by time, height and width."""
    pairs = int(_HEAD * rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    third = (pairs + 1) // 3
    return [third, third, pairs - 2 * third]


def _defaults(config_class: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """What the fields of a configuration are where nothing but some parts is said."""
    default = config_class(**deepcopy(parts))  # some take them apart
    default.allow_global_per_layer_attribute_access = True
    return {
        field.name: getattr(default, field.name, None)
        for field in dataclasses.fields(config_class)
        if field.name not in _BASE
    }


_BASE = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def _n_layers(defaults: dict[str, Any]) -> int:
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"):
        if isinstance(defaults.get(name), int):
            return int(defaults[name])
    return -1


def _every_kind(by_layer: Any) -> list[Any]:
    """A list with an entry for each layer, shortened so that every kind occurs."""
    kinds: list[Any] = []
    for kind in by_layer:
        if kind not in kinds:
            kinds.append(kind)
    return [kinds[layer % len(kinds)] for layer in range(N_LAYERS)]


def _size(name: str) -> int | None:
    return next((value for names, value in _SIZES if re.fullmatch(names, name)), None)
