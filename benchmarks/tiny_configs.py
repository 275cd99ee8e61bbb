"""A tiny configuration for any causal language model of transformers, found by the names of its fields.

Knows nothing of the engine; sizes are set by name, and the few types that need more are listed at the end.
Called by benchmarks/census.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from tests.zoo import SLIDING_WINDOW, SPECIAL_TOKEN_IDS, VOCAB_SIZE

NUM_LAYERS = 4  # enough for most alternating patterns

# Sizes by field name; a field that a configuration lacks is left out.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "unpadded_vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embedding_size": 64,
    "embedding_dim": 64,
    "emb_dim": 64,
    "input_embedding_size": 64,
    "output_embedding_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_layers": NUM_LAYERS,
    "n_layer": NUM_LAYERS,
    "n_layers": NUM_LAYERS,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "kv_channels": 16,
    "head_dim": 16,
    "swa_head_dim": 16,
    "dim_head": 16,
    "attention_head_size": 16,
    "rotary_dim": 8,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 96,
    "prefix_dense_intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "feed_forward_size": 96,
    "d_inner": 96,
    "dff": 96,
    "dim_ff": 96,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "router_hidden_size": 16,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 16,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "sliding_window": SLIDING_WINDOW,
    "sliding_window_size": SLIDING_WINDOW,
    "attention_window_size": SLIDING_WINDOW,
    "window_size": SLIDING_WINDOW,
    "local_attention": 2 * SLIDING_WINDOW,
    "attention_chunk_size": 16,
    "max_position_embeddings": 512,
    "max_seq_len": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "context_length": 512,
    "max_target_positions": 512,
    "max_source_positions": 64,
    # State space and linear attention.
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_mamba_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 4,
    "mamba_ngroups": 2,
    "n_groups": 2,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "lru_width": 64,
    "adapter_rank": 8,
    "num_codebooks": 2,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "d_rel": 8,
    "rel_extent": 64,
    "pronunciation_embed_dim": 16,
    "shape_embed_dim": 16,
    "query_pre_attn_scalar": 24,
    # Switches: the self-attention of a decoder, and no shortcut that hides a mistake.
    "is_decoder": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    **SPECIAL_TOKEN_IDS,
    "decoder_start_token_id": 2,
}

# What a type needs beside the sizes: patterns with both kinds of layer, and sizes its defaults leave open.
_LINEAR_AND_FULL = ["linear_attention", "full_attention"] * 2
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"audio_config": {"adapter_out_dim": 64}, "vision_config": {"adapter_out_dim": 64}},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 96,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR_AND_FULL},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _LINEAR_AND_FULL},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 200,
        "split_ngram_parts": 4,
        "hc_lowrank": 8,
    },
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32), "hash_seed": 0},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": NUM_LAYERS},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The configuration of a tiny model of `model_type`.

    Raises:
        Exception: whatever the type's configuration says of these values.
    """
    return CONFIG_MAPPING[model_type](**_values(CONFIG_MAPPING[model_type]))


def _values(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """The small values for a configuration class; nested configurations are made small too."""
    names = {field.name for field in dataclasses.fields(config_class)}
    default = config_class()
    settled = default.to_dict()
    values = {name: value for name, value in _SIZES.items() if name in names and _is_on(name, settled)}
    if "num_key_value_heads" in names:
        values["num_key_value_heads"] = _num_key_heads(config_class)
    for name in config_class.sub_configs:
        nested = getattr(default, name, None)
        if isinstance(nested, PretrainedConfig):
            values[name] = {**_values(type(nested)), "model_type": nested.model_type}
    return {**values, **_EXCEPTIONS.get(config_class.model_type, {})}


def _is_on(name: str, settled: dict[str, Any]) -> bool:
    """Whether to set a size: what a type leaves off by default stays off."""
    return settled.get(name) is not None or name in SPECIAL_TOKEN_IDS


def _num_key_heads(config_class: type[PretrainedConfig]) -> int:
    """Half as many key heads as query heads, unless the type says that they are as many."""
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    same = fields["num_key_value_heads"] == fields.get("num_attention_heads")
    return 4 if same or "kv_lora_rank" in fields else 2
