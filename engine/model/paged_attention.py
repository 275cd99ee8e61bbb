"""Attention over paged KV: the kernel, its plain twin, and which devices take it.

Knows nothing of scheduling or models; sees one layer's queries, its blocks and the step's layout.
Called by model/paged_step.py once a layer; chosen by engine/build.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from engine.kv.prefix import BLOCK_SIZE
from engine.model.attention import AttentionCall, attend_plain
from engine.model.flash import FlashAttention, find_flash
from engine.model.paged_inputs import PagedInputs

if TYPE_CHECKING:
    from engine.model.paged_kernel import Extras, Tables
    from engine.model.paged_step import OwnTokens, PagedAttention

MOST_SMS = 4096  # more than any device has


def attend_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    inputs: PagedInputs,
    call: AttentionCall,
    own: OwnTokens | None = None,
) -> torch.Tensor:
    """The plain twin of the kernel: gathers a sequence's blocks and attends to them as eager attention does.

    Args:
        query: [T, H, Dk].
        keys, values: [N, BLOCK_SIZE, Hkv, D].
        inputs: the step's.
        call: scaling, window, softcap and sinks.
        own: the step's own K and V, [Hkv, T, D] each; not looked at, for the blocks have them too.

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
        queries = query[first : first + num_queries].transpose(0, 1)
        parts.append(attend_plain(queries, own_keys, own_values, mask, plain).transpose(0, 1))
        first += num_queries
    return torch.cat(parts)


class KernelAttention:
    """The same by the Triton kernel: single tokens in one launch, longer runs in another.

    Args:
        device: where it runs.
        num_sms: multiprocessors of the device, which single tokens' keys are split to fill; 0 to split none.
        is_checked: whether the first call of a kind compares each way of computing it with attend_blocks.
    """

    def __init__(self, device: torch.device, num_sms: int, *, is_checked: bool = False) -> None:
        from engine.model.paged_split import num_counters

        self._device = device
        self._num_sms = num_sms
        self._is_checked = is_checked
        self._counters = torch.zeros(num_counters(num_sms), dtype=torch.int32, device=device)
        self._known: set[tuple[Hashable, ...]] = set()

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: PagedInputs,
        call: AttentionCall,
        own: OwnTokens | None = None,
    ) -> torch.Tensor:
        """As attend_blocks has it.

        Raises:
            ValueError: a head has more dimensions than the kernel takes.
            KernelDisagrees: it was checked, and computes something else than attend_blocks.
        """
        out = query.new_empty((query.shape[0], query.shape[1], values.shape[3]))
        self.attend_some(query, keys, values, inputs, call, out, len(inputs.query_lens))
        return out

    def attend_some(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: PagedInputs,
        call: AttentionCall,
        out: torch.Tensor,
        num_sequences: int,
    ) -> None:
        """The step's first `num_sequences` sequences alone, written to their rows of `out`, contiguous [T, H, Dv].

        Raises:
            ValueError, KernelDisagrees: as __call__.
        """
        from engine.model import paged_kernel
        from engine.model.paged_form import MAX_HEAD_DIM, Form, aligned

        widest = max(keys.shape[3], values.shape[3])
        if widest > MAX_HEAD_DIM:
            raise ValueError(f"a head has {widest} dimensions, the paged kernel takes {MAX_HEAD_DIM}")
        if self._is_checked:
            self._check(query, keys, values, call)
        query = aligned(query)
        sinks = None if call.sinks is None else call.sinks.contiguous()
        extras = paged_kernel.Extras(call.scaling, call.window, call.softcap, sinks)
        tables = paged_kernel.Tables(inputs.query_starts, inputs.context_lens, inputs.block_tables)
        num_singles = min(inputs.num_singles, num_sequences)
        if num_singles:
            self._attend_singles(query, keys, values, out, tables, extras, num_singles)
        if num_singles < num_sequences:
            tile_size = Form.of(query, keys, values).tile_size
            tiles = inputs.run_tiles(tile_size, num_sequences)
            paged_kernel.launch_runs(
                query,
                keys,
                values,
                out,
                tables=tables,
                extras=extras,
                tile_sequences=tiles.sequences,
                tile_firsts=tiles.firsts,
            )

    def _attend_singles(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        tables: Tables,
        extras: Extras,
        num_singles: int,
    ) -> None:
        from engine.model import paged_kernel
        from engine.model.paged_form import Form
        from engine.model.paged_split import Scratch, num_splits

        form = Form.of(query, keys, values)
        # A window's keys begin anywhere in a tile.
        most = tables.block_tables.shape[1] * BLOCK_SIZE
        most = most if extras.window is None else min(most, extras.window + form.tile_keys)
        splits = num_splits(num_singles, form.num_kv_heads, most, self._num_sms)
        scratch = None
        if splits > 1:
            num_programs = num_singles * form.num_kv_heads
            scratch = Scratch.of(self._counters, splits, num_programs, form.group, form.value_dim)
        paged_kernel.launch_singles(
            query, keys, values, out, tables=tables, extras=extras, num_singles=num_singles, scratch=scratch
        )

    def _check(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: AttentionCall) -> None:
        from engine.model.paged_check import check_kernel

        heads, dims = (query.shape[1], keys.shape[2]), (keys.shape[3], values.shape[3])
        kind = (heads, dims, query.dtype, call.window is None, call.softcap is None, call.sinks is None)
        if kind in self._known:
            return
        self._known.add(kind)
        # Unsplit; and split as far as keys allow, whatever the device.
        ways = [KernelAttention(self._device, num_sms) for num_sms in (0, MOST_SMS)]
        check_kernel(ways, attend_blocks, query, keys, values, call)


def kernel_for(device: torch.device) -> PagedAttention | None:
    """The kernel where it runs: on CUDA, with Triton installed; None elsewhere.

    With flash-attn where that is installed and works.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    kernel = KernelAttention(device, num_sms, is_checked=True)
    varlen = find_flash(device)
    return kernel if varlen is None else FlashAttention(varlen, kernel)
