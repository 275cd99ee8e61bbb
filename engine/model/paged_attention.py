"""Attention over paged KV: the kernel, its plain twin, and which devices take it.

Knows nothing of scheduling or models; sees one layer's queries, its blocks and the step's layout.
Called by model/paged_step.py once a layer; chosen by engine/build.py.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from engine.model.attention import AttentionCall, attend_plain
from engine.model.paged_inputs import PagedInputs

if TYPE_CHECKING:
    from engine.model.paged_step import PagedAttention


def attend_blocks(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: PagedInputs, call: AttentionCall
) -> torch.Tensor:
    """The plain twin of the kernel: gathers a sequence's blocks and attends to them as eager attention does.

    Args:
        query: [T, H, Dk].
        keys, values: [N, BLOCK_SIZE, Hkv, D].
        inputs: the step's.
        call: scaling, window, softcap and sinks.

    Returns:
        [T, H, Dv].
    """
    num_heads, num_groups = query.shape[1], query.shape[1] // keys.shape[2]
    sinks = None if call.sinks is None else call.sinks.view(num_heads, 1, 1)
    plain = AttentionCall(call.scaling, call.window, call.softcap, sinks)
    parts = []
    first = 0
    for row, (num_queries, length) in enumerate(zip(inputs.query_lens, inputs.lengths, strict=True)):
        table = inputs.block_tables[row]
        # [H, L, D], nothing past the context: what lies there was never written, or by somebody else
        own_keys, own_values = (
            cached[table].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(num_groups, 0)
            for cached in (keys, values)
        )
        # What the step's tensors say, not its numbers: those of a captured step are bounds.
        past_last = inputs.context_lens[row]
        positions = torch.arange(length, device=query.device)
        query_positions = (past_last - num_queries + torch.arange(num_queries, device=query.device))[:, None]
        mask = positions <= query_positions
        own_values = own_values.masked_fill((positions >= past_last)[:, None], 0)  # a weight of 0 times NaN is NaN
        if call.window is not None:
            mask &= positions > query_positions - call.window
        own = query[first : first + num_queries].transpose(0, 1)
        parts.append(attend_plain(own, own_keys, own_values, mask, plain).transpose(0, 1))
        first += num_queries
    return torch.cat(parts)


def attend_kernel(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: PagedInputs, call: AttentionCall
) -> torch.Tensor:
    """The same by the Triton kernel: single tokens in one launch, longer runs in another.

    Raises:
        ValueError: a head has more dimensions than the kernel takes.
    """
    from engine.model import paged_kernel

    widest = max(keys.shape[3], values.shape[3])
    if widest > paged_kernel.MAX_HEAD_DIM:
        raise ValueError(f"a head has {widest} dimensions, the paged kernel takes {paged_kernel.MAX_HEAD_DIM}")
    if query.stride(2) != 1:
        query = query.contiguous()
    out = query.new_empty((query.shape[0], query.shape[1], values.shape[3]))
    form = paged_kernel.Form.of(query, keys, values)
    launches = []
    if inputs.num_singles:
        launches.append((inputs.single_tiles(), form.num_rows(is_single=True)))
    if inputs.num_singles < len(inputs.query_lens):
        num_rows = form.num_rows(is_single=False)
        launches.append((inputs.run_tiles(num_rows // form.group), num_rows))
    for tiles, num_rows in launches:
        paged_kernel.launch(
            query,
            keys,
            values,
            out,
            tile_sequences=tiles.sequences,
            tile_firsts=tiles.firsts,
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
            block_tables=inputs.block_tables,
            scaling=call.scaling,
            window=call.window,
            softcap=call.softcap,
            sinks=None if call.sinks is None else call.sinks.contiguous(),
            num_rows=num_rows,
        )
    return out


def kernel_for(device: torch.device) -> PagedAttention | None:
    """The kernel where it runs: on CUDA, with Triton installed; None elsewhere."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return attend_kernel
