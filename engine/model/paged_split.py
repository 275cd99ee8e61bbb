"""Splitting a single token's keys over programs that attend to a part each, so that few rows fill a GPU.

Knows nothing of steps, models or how a part is attended to; importable only where Triton is.
Called by model/paged_form.py, model/paged_kernel.py and model/paged_attention.py.

A program leaves the maximum, the sum and the weighted values of its part in float32, and counts itself as done; the
last one to be done combines all of them, in the order of the parts whatever the order they ended in, so that a run can
be repeated bit for bit. A part is made of whole tiles, and how many keys it has follows from the sequence's own length:
the grid is as large as the widest sequence could need, programs that find no keys leave at once, and a captured launch
serves any length.
"""

# Triton reads annotations of kernels as its own: theirs have none.
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MIN_KEYS = 128  # of a part: fewer take less time than it takes to combine them
MAX_SPLITS = 128
PROGRAMS_PER_SM = 2  # what fits beside each other and keeps the memory busy
NEVER = tl.constexpr(-1.0e30)  # the maximum of no scores: finite, so that 2 ** (NEVER - NEVER) is a number
_COMBINED_AT_ONCE = 8192  # float32 values: 64 registers a thread


def num_splits(num_rows: int, num_kv_heads: int, max_context: int, num_sms: int) -> int:
    """Programs that share the keys of a token under one KV head.

    Args:
        num_rows: single tokens of the step; taken as the next power of 2, so that a step that is padded to a captured
            size is split as it is without padding.
        num_kv_heads: of the layer.
        max_context: keys that no row has more of. It only leaves out programs that would find no keys: a row's parts
            are the same for any that is large enough.
        num_sms: of the device.

    Returns:
        At least 1; 1 where rows and heads alone make programs enough, or where contexts are short.
    """
    num_programs = int(triton.next_power_of_2(num_rows)) * num_kv_heads
    return max(1, min(PROGRAMS_PER_SM * num_sms // num_programs, -(-max_context // MIN_KEYS), MAX_SPLITS))


def num_counters(num_sms: int) -> int:
    """How many (row, KV head) a split launch has at most."""
    return max(1, PROGRAMS_PER_SM * num_sms // 2)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where the programs of a split launch leave their parts.

    Args:
        summed: float32 [rows * Hkv, splits, group, Dv], values by weight.
        stats: float32 [rows * Hkv, 2, splits, group], maxima of the scores, in units of log 2, and sums of the weights.
        counters: int32, at least rows * Hkv, all 0 between launches: programs that are done.
        num_splits: programs for each row and KV head.
    """

    summed: torch.Tensor
    stats: torch.Tensor
    counters: torch.Tensor
    num_splits: int

    @classmethod
    def of(cls, counters: torch.Tensor, num_splits: int, num_programs: int, group: int, value_dim: int) -> Scratch:
        """Memory for `num_programs` rows times KV heads of `group` query heads each."""
        size = num_programs * num_splits * group
        both = torch.empty(size * (value_dim + 2), dtype=torch.float32, device=counters.device)
        return cls(both[: size * value_dim], both[size * value_dim :], counters, num_splits)


def split_constants(group: int, value_pad: int) -> dict[str, int]:
    """What `finish_part` is compiled for."""
    group_pad = int(triton.next_power_of_2(group))
    return {
        "MIN_KEYS": MIN_KEYS,
        "GROUP_PAD": group_pad,
        "SPLITS_PAD": MAX_SPLITS,
        "CHUNK": max(1, min(_COMBINED_AT_ONCE // (group_pad * value_pad), 16)),
    }


@triton.jit  # type: ignore[untyped-decorator]
def part_of(  # type: ignore[no-untyped-def]
    first_key, last_key, split, num_splits, KEYS: tl.constexpr, MIN_KEYS: tl.constexpr
):  # fmt: skip
    """The first key of a part, the key past its last, and how many parts have keys."""
    num_tiles = tl.cdiv(last_key - first_key, KEYS)
    size = tl.maximum(tl.cdiv(num_tiles, num_splits), MIN_KEYS // KEYS) * KEYS
    start = first_key + split * size
    return start, tl.minimum(start + size, last_key), tl.cdiv(last_key - first_key, size)


@triton.jit  # type: ignore[untyped-decorator]
def _leave_part(  # type: ignore[no-untyped-def]
    highest, total, summed, is_row, stats, sums, counter, split, num_splits, num_used,
    GROUP: tl.constexpr, ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Write one part of a (row, KV head), whose scratch begins at `stats` and `sums`; whether all are there now."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, VALUE_PAD)
    at = split * GROUP + rows
    tl.store(stats + at, highest, mask=is_row)
    tl.store(stats + num_splits * GROUP + at, total, mask=is_row)
    tl.store(sums + at[:, None] * VALUE_DIM + dims[None, :], summed, mask=is_row[:, None] & (dims < VALUE_DIM)[None, :])
    # All threads' writes come before the count, which releases them; who counts last acquires everybody's.
    tl.debug_barrier()
    num_before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return num_before == num_used - 1


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    stats, sums, num_splits, num_used,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr, CHUNK: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Attention of a (row, KV head) from its parts: [GROUP_PAD, VALUE_PAD] float32."""
    heads, dims = tl.arange(0, GROUP_PAD), tl.arange(0, VALUE_PAD)
    parts = tl.arange(0, SPLITS_PAD)
    is_there = (parts < num_used)[:, None] & (heads < GROUP)[None, :]
    at = parts[:, None] * GROUP + heads[None, :]
    # .cg: from the cache that all SMs share; no SM's own may know what another wrote.
    highest = tl.load(stats + at, mask=is_there, other=NEVER, cache_modifier=".cg")
    totals = tl.load(stats + num_splits * GROUP + at, mask=is_there, other=0.0, cache_modifier=".cg")
    top = tl.max(highest, 0)  # [GROUP_PAD]
    total = tl.sum(totals * tl.exp2(highest - top[None, :]), 0)
    summed = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    for first in range(0, num_used, CHUNK):
        parts_now = first + tl.arange(0, CHUNK)
        is_now = (parts_now < num_used)[:, None] & (heads < GROUP)[None, :]
        at_now = parts_now[:, None] * GROUP + heads[None, :]
        highest_now = tl.load(stats + at_now, mask=is_now, other=NEVER, cache_modifier=".cg")
        weights = tl.where(is_now, tl.exp2(highest_now - top[None, :]), 0.0)
        values = tl.load(
            sums + at_now[:, :, None] * VALUE_DIM + dims[None, None, :],
            mask=is_now[:, :, None] & (dims < VALUE_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [CHUNK, GROUP_PAD, VALUE_PAD]
        summed += tl.sum(values * weights[:, :, None], 0)
    return summed / tl.where(heads < GROUP, total, 1.0)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def finish_part(  # type: ignore[no-untyped-def]
    highest, total, summed, is_row, out, stats, sums, counters, place, split, num_splits, num_used,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr, SPLITS_PAD: tl.constexpr, CHUNK: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Leave one part of the (row, KV head) number `place`; who leaves the last one writes all of them to `out`."""
    own_stats = stats + place * num_splits * (2 * GROUP)
    own_sums = sums + place * num_splits * (GROUP * VALUE_DIM)
    is_last = _leave_part(
        highest, total, summed, is_row, own_stats, own_sums, counters + place, split, num_splits, num_used,
        GROUP, ROWS, VALUE_DIM, VALUE_PAD,
    )  # fmt: skip
    if is_last:
        result = _combine(
            own_stats, own_sums, num_splits, num_used, GROUP, GROUP_PAD, SPLITS_PAD, CHUNK, VALUE_DIM, VALUE_PAD
        )
        heads, dims = tl.arange(0, GROUP_PAD), tl.arange(0, VALUE_PAD)
        tl.store(
            out + heads[:, None] * VALUE_DIM + dims[None, :],
            result.to(out.dtype.element_ty),
            mask=(heads < GROUP)[:, None] & (dims < VALUE_DIM)[None, :],
        )
        tl.store(counters + place, 0)  # as the next launch wants to find it
