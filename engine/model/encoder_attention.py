"""Attention of a speech encoder: every position sees every other, and there is no mask.

Knows nothing of steps, slots or decoders.
Registered with transformers by model/seq2seq_check.py, for encoders of speech in bfloat16 on the CPU.

There plain products take less than two thirds of the fused kernel's time: 54 ms instead of 90 for 12 heads over 1,500
positions, one thread; 30 instead of 45 with two. A head at a time, since the scores of 500 queries (1.5 MB) stay in the
cache until they are used, which those of 12 heads for 128 queries do not (83 ms). In float32 they gain nothing. Our own
kernel, where the model's layers have it, takes three quarters of that (43 ms where plain products take 58).
"""

from __future__ import annotations

from typing import Any

import torch

from engine.model.native_step import can_attend, kernels_of

NAME = "encoder_blocks"
BLOCK_QUERIES = 500


def encoder_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [B, H, T, D] over itself: [B, T, H, D] and no weights.

    Raises:
        NotImplementedError: there is a mask.
    """
    if attention_mask is not None:
        raise NotImplementedError("a speech encoder has no mask")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    kernels = kernels_of(module)
    if kernels is not None and can_attend(query, key, value):
        return kernels.attend_positions(query, key, value, scale), None
    return attend_in_blocks(query, key, value, scale), None


def attend_in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The same by plain products over blocks of queries, the twin of NativeKernels.attend_positions: [B, T, H, D]."""
    batch, num_heads, length, _ = query.shape
    # A head's positions side by side: as the model leaves them, heads alternate, which costs more than these copies.
    rows, keys, values = (tensor.flatten(0, 1).contiguous() for tensor in (query, key, value))
    keys = keys.transpose(1, 2)
    output = query.new_empty((batch * num_heads, length, value.shape[3]))
    for head in range(batch * num_heads):
        of_head = slice(head, head + 1)
        for first in range(0, length, BLOCK_QUERIES):
            part = slice(first, first + BLOCK_QUERIES)
            scores = torch.baddbmm(rows.new_empty(()), rows[of_head, part], keys[of_head], beta=0.0, alpha=scale)
            torch.bmm(torch.softmax(scores, dim=-1), values[of_head], out=output[of_head, part])
    return output.view(batch, num_heads, length, -1).transpose(1, 2)


def is_faster(model: Any, device: torch.device) -> bool:
    """Whether this form is for a model's encoder."""
    return device.type == "cpu" and model.dtype is torch.bfloat16
