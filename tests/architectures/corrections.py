"""What the tiny configurations of some model types need beyond what goes by name."""

from __future__ import annotations

from typing import Any

_LINEAR = ["linear_attention", "full_attention"]


def alternating(*kinds: Any) -> list[Any]:
    """One of the kinds for each of five layers, in turn."""
    return [kinds[layer % len(kinds)] for layer in range(5)]


def window(tokens: int) -> int:
    """The window itself."""
    return tokens


def blocks(tokens: int) -> int:
    """The window in blocks of sixteen tokens."""
    return tokens // 16


CORRECTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {
        "vocabulary_map": {"<image>": 300, "IMGIMGA": 301},
        "vq_config": {"channel_multiplier": [1, 1]},
    },
    "cohere_compass_text": {
        "layer_types": alternating("sliding_attention", "full_attention"),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_ocr2_text": {
        **{"mlp_layer_types": alternating("dense", "sparse"), "num_experts_per_tok": 2},
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "layer_types": alternating(
            "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
        ),
        "mlp_layer_types": alternating("hash_moe", "moe"),
        "o_groups": 2,
    },
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision"}},
    "diffusion_gemma_text": {
        **{"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {
        "vocabulary_map": {"<image>": 300, "<|visual token 000000|>": 301},
        "vq_config": {"channel_multiplier": [1, 1]},
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "florence2": {
        "vision_config": {key: [4, 4, 4, 4] for key in ("embed_dim", "num_heads", "num_groups")},
    },
    "gemma3n_text": {
        "layer_types": alternating("sliding_attention", "full_attention"),
        "num_kv_shared_layers": 2,
    },
    "gemma4_assistant": {
        "text_config": {
            **{"model_type": "gemma4_text", "num_kv_shared_layers": 5},
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        },
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "glm5_next_text": {
        **{"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 8},
        "layer_types": alternating("linear_attention", "deepseek_sparse_attention"),
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "granite4_vision": {
        "text_config": {"model_type": "granite4_vision_text"},
        **{"downsample_rate": "1/2", "deepstack_layer_map": [[1, 1]]},
        **{"spatial_target_layers": [1, 2, 3, 4]},
    },
    "granitemoehybrid": {"layer_types": alternating(*_LINEAR)},
    "hrm_text": {"num_layers_per_stack": 2},
    "janus": {"vq_config": {"channel_multiplier": [1, 1]}},
    "lfm2": {"layer_types": alternating("conv", "full_attention")},
    "lfm2_moe": {"layer_types": alternating("conv", "full_attention")},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": alternating("sliding_attention", "full_attention")},
    "minimax_m3_vl_text": {
        "layer_types": alternating("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": alternating("dense", "sparse"),
        "index_topk_blocks": blocks,
    },
    "mllama": {"vision_config": {"image_size": 28}},
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 300},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 300},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": window, "indexer_compress_ratio": 8},
        **{"ple_layer_ids": [1], "ngram_vocab_size_base": 64, "split_ngram_parts": 1},
    },
    "reformer": {
        **{"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
        **{"local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16},
    },
    "step3p5": {
        "layer_types": alternating("sliding_attention", "full_attention"),
        "sliding_window": window,
    },
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2", "is_decoder": True, "add_cross_attention": True},
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {
        "layer_types": alternating("hybrid", "hybrid_sliding"),
        **{"num_experts_per_tok": 1, "sliding_window": window},
    },
}
"""By model type, also of a part of a model. A dictionary for a part corrects that part, or says of
which type it is; a function is of the window."""
