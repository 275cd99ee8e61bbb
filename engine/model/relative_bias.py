"""T5's relative position bias for rows that stand at positions of their own.

Knows nothing of layers or steps: a table of biases by distance, and the masks made from it.
Called by model/attention.py. The model itself makes one bias for a whole batch, from one number of tokens seen so far;
in a continuous batch that is wrong for every row but one.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.model.placement import execution_device


def is_relative(module: Any) -> bool:
    """Whether an attention module learns a bias by distance (T5 and its kin; in most of them only the first layer)."""
    return bool(getattr(module, "has_relative_attention_bias", False))


def bias_table(module: Any) -> torch.Tensor:
    """Bias by distance: [H, N] of the module's dtype, entry d for a key d positions back; the last is for all beyond.

    Made by the module's own compute_bias, so that buckets are the model's. Distances of relative_attention_max_distance
    and more share a bucket (Raffel et al. 2020, section 2.1).
    """
    num_distances = int(module.relative_attention_max_distance) + 1
    device = execution_device(module.relative_attention_bias)
    bias: torch.Tensor = module.compute_bias(1, num_distances, device, past_seen_tokens=num_distances - 1)
    return bias[0, :, 0].flip(-1).contiguous()


def decode_bias(table: torch.Tensor, lengths: torch.Tensor, max_length: int, num_kv_heads: int) -> torch.Tensor:
    """Additive mask of single-token rows.

    Args:
        table: [H, N], from bias_table.
        lengths: int64 [S], keys of each row, its own last.
        max_length: L, keys that are read.
        num_kv_heads: Hkv, of H = Hkv * G.

    Returns:
        [S, Hkv, G, L] of the table's dtype, -inf beyond a row's length.
    """
    distance = lengths[:, None] - 1 - torch.arange(max_length, device=lengths.device)
    bias = table[:, distance.clamp(0, table.shape[1] - 1)]  # [H, S, L]
    bias = bias.masked_fill(distance < 0, float("-inf")).transpose(0, 1)
    return bias.reshape(lengths.shape[0], num_kv_heads, -1, max_length)


def chunk_bias(table: torch.Tensor, start: int, num_queries: int, num_kv_heads: int) -> torch.Tensor:
    """Additive causal mask of a run of one sequence's tokens from position `start` on: [Hkv, G, Tq, start + Tq]."""
    queries = torch.arange(start, start + num_queries, device=table.device)[:, None]
    distance = queries - torch.arange(start + num_queries, device=table.device)
    bias = table[:, distance.clamp(0, table.shape[1] - 1)].masked_fill(distance < 0, float("-inf"))
    return bias.reshape(num_kv_heads, -1, *distance.shape)
