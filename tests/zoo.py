"""Tiny random causal language models, one of each attention habit, and what `generate` says of them.

Knows nothing of the engine or the server; every weight is random, norms and biases too, so that none may be forgotten.
Called by tests of the engine and the API, and by benchmarks/census.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 256
# No EOS: outputs have the length that was asked for.
SPECIAL_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
# Prompts of tests and the census should be longer than these, so that both are crossed.
SLIDING_WINDOW = 12
ORIGINAL_MAX_POSITIONS = 24


@dataclass(frozen=True, slots=True)
class Family:
    """One tiny architecture: a model type of transformers and the configuration values that make it small."""

    model_type: str
    values: dict[str, Any] = field(default_factory=dict)
    weight_std: float = 0.12


def _decoder(**changes: Any) -> dict[str, Any]:
    """Values most decoders share: two layers, four query heads over two key heads."""
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return {**values, **changes}


_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QUERY_KEY_NAMES = ("q_proj", "k_proj", "qkv", "query", "c_attn", "q_b_proj", "kv_a_proj")
_SMALL_ROPE_HEAD = {"head_dim": 16}

FLAT_FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _decoder(attention_bias=True, mlp_bias=True)),
    "mistral": Family("mistral", _decoder(sliding_window=SLIDING_WINDOW)),
    "qwen2": Family("qwen2", _decoder()),
    "qwen3": Family("qwen3", _decoder(head_dim=32)),
    "qwen3_moe": Family(
        "qwen3_moe", _decoder(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "mixtral": Family("mixtral", _decoder(**_EXPERTS)),
    "gemma": Family("gemma", _decoder(num_key_value_heads=1, head_dim=32)),
    "gemma2": Family(
        "gemma2",
        _decoder(
            num_hidden_layers=4,
            sliding_window=SLIDING_WINDOW,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
            **_SMALL_ROPE_HEAD,
        ),
    ),
    "gemma3_text": Family(
        "gemma3_text",
        _decoder(
            num_hidden_layers=4,
            sliding_window=SLIDING_WINDOW,
            query_pre_attn_scalar=24,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            **_SMALL_ROPE_HEAD,
        ),
    ),
    "phi3": Family("phi3", _decoder()),
    "gpt2": Family("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gpt_neox": Family("gpt_neox", _decoder()),
    "opt": Family(
        "opt",
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
        },
    ),
    "stablelm": Family("stablelm", _decoder(use_qkv_bias=True, qk_layernorm=True)),
    "olmo2": Family("olmo2", _decoder()),
    "granite": Family(
        "granite",
        _decoder(embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.4, logits_scaling=2.0),
    ),
    "cohere": Family("cohere", _decoder(use_qk_norm=True, logit_scale=0.5)),
    "gpt_oss": Family("gpt_oss", _decoder(head_dim=16, sliding_window=SLIDING_WINDOW, **_EXPERTS)),
    "deepseek_v3": Family(
        "deepseek_v3",
        _decoder(
            num_key_value_heads=4,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=24,
            q_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=20,
            num_mtp_layers=0,
        ),
    ),
}

SOLO_FAMILIES: dict[str, Family] = {
    "bloom": Family("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": Family("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2}),
    "gptj": Family("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8}),
    "falcon": Family(
        "falcon",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
            "multi_query": False,
            "new_decoder_architecture": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    "mamba": Family("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": Family(
        "mamba2",
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2},
    ),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "lru_width": 64,
            "attention_window_size": SLIDING_WINDOW,
        },
    ),
    "jamba": Family(
        "jamba",
        _decoder(
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
    "falcon_h1": Family(
        "falcon_h1",
        _decoder(head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16),
    ),
    "bamba": Family(
        "bamba",
        _decoder(
            num_hidden_layers=3,
            attn_layer_indices=[1],
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_chunk_size=16,
        ),
    ),
    "zamba2": Family(
        "zamba2",
        _decoder(
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            num_key_value_heads=4,
            num_mem_blocks=1,
            use_shared_attention_adapter=False,
            n_mamba_heads=8,
            mamba_d_state=8,
            mamba_ngroups=2,
            chunk_size=16,
        ),
    ),
    "qwen3_next": Family(
        "qwen3_next",
        _decoder(
            num_hidden_layers=4,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
    ),
    "lfm2": Family("lfm2", _decoder(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])),
    "minimax": Family(
        "minimax",
        _decoder(head_dim=16, block_size=8, layer_types=["linear_attention", "full_attention"], **_EXPERTS),
    ),
    "rwkv": Family("rwkv", {"hidden_size": 64, "num_hidden_layers": 2, "context_length": 512}),
    "phi3_longrope": Family(
        "phi3",
        _decoder(
            original_max_position_embeddings=ORIGINAL_MAX_POSITIONS,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 1.5 * i for i in range(8)],
                "factor": 8.0,
            },
        ),
    ),
    "llama_dynamic": Family(
        "llama",
        _decoder(
            max_position_embeddings=ORIGINAL_MAX_POSITIONS,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        ),
    ),
}

FAMILIES: dict[str, Family] = {**FLAT_FAMILIES, **SOLO_FAMILIES}


def make(name: str, *, seed: int = 0) -> tuple[PreTrainedModel, PretrainedConfig]:
    """Build the tiny model called `name`, in float32 and eval mode.

    Raises:
        KeyError: no family has that name.
    """
    family = FAMILIES[name]
    # Untied: with tied embeddings a random model likes to repeat its input, which hides mistakes.
    shared = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": False, **SPECIAL_TOKEN_IDS}
    config = AutoConfig.for_model(family.model_type, **{**shared, **family.values})
    return instantiate(config, seed=seed, weight_std=family.weight_std), config


def instantiate(config: PretrainedConfig, *, seed: int = 0, weight_std: float = 0.12) -> PreTrainedModel:
    """Build a float32 model from `config` with random weights, in eval mode; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model, weight_std=weight_std)
    # The model's choice alone: no EOS forced at the end, nothing suppressed, as some types' defaults have it.
    rules: dict[str, int | None] = {"forced_eos_token_id": None, "forced_bos_token_id": None, "suppress_tokens": None}
    rules |= {"begin_suppress_tokens": None, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0}
    model.generation_config.update(**SPECIAL_TOKEN_IDS, **rules, do_sample=False)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, *, weight_std: float) -> None:
    """Give matrices fresh weights and disturb vectors (norms, biases, sinks, decays) around their start values."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape)
        if weight.dim() < 2 or name.endswith("A_log"):
            # Large biases would make a constant of the output.
            weight.add_(noise * (0.1 if "bias" in name else 0.25))
        elif any(part in name for part in _QUERY_KEY_NAMES):
            # Sharp attention: a flat one averages the context away, and a wrong token in it would not be noticed.
            weight.copy_(noise * weight_std * 2)
        else:
            weight.copy_(noise * weight_std)


def prompt(length: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """`length` random token ids, none of them special."""
    # random.Random, not torch: the same ids whatever ran before.
    return random.Random(f"{seed}/{length}").choices(range(3, vocab_size), k=length)


@torch.no_grad()
def generate(model: PreTrainedModel, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """What `model.generate` answers, greedily: the reference every lane must match. Returns the new tokens only."""
    input_ids = torch.tensor([prompt_ids])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
    )
    tokens: list[int] = output[0, len(prompt_ids) :].tolist()
    return tokens


def is_diverse(outputs: list[list[int]]) -> bool:
    """Whether outputs of different prompts are varied enough to prove anything: all differ, a quarter of tokens do."""
    tokens = [token for output in outputs for token in output]
    return len({tuple(output) for output in outputs}) == len(outputs) and 4 * len(set(tokens)) > len(tokens)
