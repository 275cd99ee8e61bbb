"""Attention over paged KV as one Triton kernel: decode and chunks of prompts, in the same form.

Knows nothing of steps or models; importable only where Triton is.
Called by model/paged_attention.py, whose plain twin says in torch what this computes.

A program takes one KV head and one tile of a sequence's queries. The query heads that share the KV head are rows of the
tile beside each other, so that K and V are read once for all of them and a single token still fills a matrix product.
It walks over the keys that the tile sees, a few blocks at a time, with the running maximum and sum of the softmax in
float32. Where single tokens are too few to fill the device, several programs walk over a part each (paged_split.py).
"""

# Triton reads annotations of kernels as its own: theirs have none.
# ruff: noqa: ANN001

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.model.paged_form import Form, query_strides
from engine.model.paged_split import NEVER, Scratch, finish_part, part_of

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)


@dataclass(frozen=True, slots=True)
class Extras:
    """What the scores of a layer go through, as model/attention.py's AttentionCall has it; sinks [H], contiguous."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Tables:
    """Where the sequences of a step lie, all int64: PagedInputs' query_starts, context_lens and block_tables."""

    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor


def launch_singles(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: Tables,
    extras: Extras,
    num_singles: int,
    scratch: Scratch | None,
) -> None:
    """Attention of the first `num_singles` tokens, a sequence each, written to their rows of `out`.

    Args:
        query: [T, H, Dk], as `aligned` returns it.
        keys, values: [N, BLOCK_SIZE, Hkv, D].
        out: [T, H, Dv], contiguous; mutated.
        tables: of the sequences; only those of the first `num_singles` are read.
        extras: of the layer.
        num_singles: at least 1.
        scratch: for programs that share a token's keys; None where each walks over all of them.
    """
    grid = (num_singles, keys.shape[2], 1 if scratch is None else scratch.num_splits)
    _launch(grid, query, keys, values, out, tables, extras, tables.query_starts, tables.query_starts, scratch)


def launch_runs(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: Tables,
    extras: Extras,
    tile_sequences: torch.Tensor,
    tile_firsts: torch.Tensor,
) -> None:
    """Attention of runs of tokens, in tiles of `Form.tile_size` queries each.

    Args:
        query, keys, values, out, tables, extras: as launch_singles has them.
        tile_sequences, tile_firsts: int64 [tiles], a tile's sequence and its first query within it.
    """
    grid = (tile_sequences.shape[0], keys.shape[2], 1)
    _launch(grid, query, keys, values, out, tables, extras, tile_sequences, tile_firsts, None, is_single=False)


def _launch(
    grid: tuple[int, int, int],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    tables: Tables,
    extras: Extras,
    tile_sequences: torch.Tensor,
    tile_firsts: torch.Tensor,
    scratch: Scratch | None,
    *,
    is_single: bool = True,
) -> None:
    form = Form.of(query, keys, values)
    token_stride, head_stride = query_strides(query)
    _paged_attention[grid](
        query,
        keys,
        values,
        out,
        query if extras.sinks is None else extras.sinks,
        out if scratch is None else scratch.stats,
        out if scratch is None else scratch.summed,
        out if scratch is None else scratch.counters,
        tile_sequences,
        tile_firsts,
        tables.query_starts,
        tables.context_lens,
        tables.block_tables,
        extras.scaling,
        0.0 if extras.softcap is None else extras.softcap,
        0 if extras.window is None else extras.window,
        token_stride,
        head_stride,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        tables.block_tables.shape[1],
        **form.constants(
            is_single=is_single,
            is_split=scratch is not None,
            has_window=extras.window is not None,
            has_softcap=extras.softcap is not None,
            has_sinks=extras.sinks is not None,
        ),
        **form.options(is_single=is_single),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _product(left, right, WIDENS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN202
    if WIDENS:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _walk(  # type: ignore[no-untyped-def]  # noqa: ANN202
    q, highest, total, summed, keys, values, table, positions, first_key, last_key,
    scaling, softcap, window,
    key_stride_block, key_stride_position, value_stride_block, value_stride_position,
    KEYS: tl.constexpr, BLOCK: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_MASKED: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Go over the keys from `first_key` to before `last_key`; the maximum, the sum and the values by weight.

    Without IS_MASKED these are whole tiles of which every row of q sees every key.
    """
    key_dims, value_dims = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    for start in range(first_key, last_key, KEYS):
        key_positions = start + tl.arange(0, KEYS)
        key_mask, value_mask = (key_dims < KEY_DIM)[:, None], (value_dims < VALUE_DIM)[None, :]
        if IS_MASKED:
            is_key = key_positions < last_key
            blocks = tl.load(table + key_positions // BLOCK, mask=is_key, other=0)
            key_mask, value_mask = key_mask & is_key[None, :], value_mask & is_key[:, None]
        else:
            blocks = tl.load(table + key_positions // BLOCK)
        key_at = blocks * key_stride_block + key_positions % BLOCK * key_stride_position
        k = tl.load(keys + key_at[None, :] + key_dims[:, None], mask=key_mask, other=0.0)  # [KEY_PAD, KEYS]
        scores = _product(q, k, WIDENS) * scaling
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both infinities.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        scores = scores * LOG2_E
        if IS_MASKED:
            is_seen = (key_positions[None, :] <= positions[:, None]) & is_key[None, :]
            if HAS_WINDOW:
                is_seen = is_seen & (key_positions[None, :] > positions[:, None] - window)
            scores = tl.where(is_seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        value_at = blocks * value_stride_block + key_positions % BLOCK * value_stride_position
        v = tl.load(values + value_at[:, None] + value_dims[None, :], mask=value_mask, other=0.0)  # [KEYS, VALUE_PAD]
        summed = summed * shrink[:, None] + _product(weights.to(v.dtype), v, WIDENS)
        highest = new_highest
    return highest, total, summed


@triton.jit  # type: ignore[untyped-decorator]
def _find_tile(tile_sequences, tile_firsts, query_starts, IS_SINGLE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """This program's sequence and its first query there, the sequence's first token, and how many it has."""
    if IS_SINGLE:  # they come first, so that a sequence's number is its token's
        sequence = tl.program_id(0)
        return sequence, 0, sequence.to(tl.int64), 1
    else:
        # From the end: the tiles that see most begin first, and none of them is left over when the others are done.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        sequence = tl.load(tile_sequences + tile).to(tl.int32)
        query_start = tl.load(query_starts + sequence)
        query_len = (tl.load(query_starts + sequence + 1) - query_start).to(tl.int32)
        return sequence, tl.load(tile_firsts + tile).to(tl.int32), query_start, query_len


# What differs from step to step must not make Triton compile again while requests wait: it specialises on alignment.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["table_stride", "window"],
    do_not_specialize_on_alignment=[
        "tile_sequences", "tile_firsts", "query_starts", "context_lens", "block_tables", "stats", "counters", "sinks",
    ],
)  # fmt: skip
def _paged_attention(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    out,
    sinks,
    stats,
    sums,
    counters,
    tile_sequences,
    tile_firsts,
    query_starts,
    context_lens,
    block_tables,
    scaling,
    softcap,
    window,
    query_stride_token,
    query_stride_head,
    key_stride_block,
    key_stride_position,
    key_stride_head,
    value_stride_block,
    value_stride_position,
    value_stride_head,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDENS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    TILE_QUERIES: tl.constexpr = ROWS // GROUP
    OUT_STRIDE: tl.constexpr = KV_HEADS * GROUP * VALUE_DIM
    kv_head = tl.program_id(1)
    sequence, first, query_start, query_len = _find_tile(tile_sequences, tile_firsts, query_starts, IS_SINGLE)
    context_len = tl.load(context_lens + sequence).to(tl.int32)
    past = context_len - query_len  # position of the sequence's first query
    last_key = context_len  # past what the tile's last query sees
    if not IS_SINGLE:
        last_key = past + tl.minimum(first + TILE_QUERIES, query_len)
    first_key = 0
    if HAS_WINDOW:
        first_key = tl.maximum(past + first - window + 1, 0) // KEYS * KEYS
    split, num_used = 0, 1
    if IS_SPLIT:
        split = tl.program_id(2)
        first_key, last_key, num_used = part_of(first_key, last_key, split, tl.num_programs(2), KEYS, MIN_KEYS)
        if split >= num_used:
            return

    rows = tl.arange(0, ROWS)
    queries = first + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = (rows < TILE_QUERIES * GROUP) & (queries < query_len)
    positions = past + queries
    key_dims, value_dims = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    query_at = (query_start + queries) * query_stride_token + heads * query_stride_head
    q = tl.load(
        query + query_at[:, None] + key_dims[None, :], mask=is_row[:, None] & (key_dims < KEY_DIM)[None, :], other=0.0
    )  # [ROWS, KEY_PAD]

    # Scores in units of log 2, for exp2. The start is finite: a tile whose keys are all out of a row's window must
    # give 2 ** -inf = 0, not inf - inf.
    highest = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        # A sink is a key of weight 1 and value 0, in the first part if there are many.
        highest = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        total = tl.where(rows >= 0, 1.0, 0.0) * tl.where(split == 0, 1.0, 0.0)
    summed = tl.zeros([ROWS, VALUE_PAD], tl.float32)

    table = block_tables + sequence.to(tl.int64) * table_stride
    own_keys, own_values = keys + kv_head * key_stride_head, values + kv_head * value_stride_head
    first_masked = first_key
    if not IS_SINGLE and not HAS_WINDOW:
        first_masked = (past + first + 1) // KEYS * KEYS
        highest, total, summed = _walk(
            q, highest, total, summed, own_keys, own_values, table, positions, first_key, first_masked,
            scaling, softcap, window,
            key_stride_block, key_stride_position, value_stride_block, value_stride_position,
            KEYS, BLOCK, KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD, HAS_WINDOW, HAS_SOFTCAP, False, WIDENS,
        )  # fmt: skip
    highest, total, summed = _walk(
        q, highest, total, summed, own_keys, own_values, table, positions, first_masked, last_key,
        scaling, softcap, window,
        key_stride_block, key_stride_position, value_stride_block, value_stride_position,
        KEYS, BLOCK, KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD, HAS_WINDOW, HAS_SOFTCAP, True, WIDENS,
    )  # fmt: skip

    if num_used > 1:
        place = sequence * KV_HEADS + kv_head
        finish_part(
            highest, total, summed, is_row, out + query_start * OUT_STRIDE + kv_head * (GROUP * VALUE_DIM),
            stats, sums, counters, place, split, tl.num_programs(2), num_used,
            GROUP, GROUP_PAD, ROWS, SPLITS_PAD, CHUNK, VALUE_DIM, VALUE_PAD,
        )  # fmt: skip
        return
    out_at = (query_start + queries) * OUT_STRIDE + heads * VALUE_DIM
    tl.store(
        out + out_at[:, None] + value_dims[None, :],
        (summed / tl.where(is_row, total, 1.0)[:, None]).to(out.dtype.element_ty),
        mask=is_row[:, None] & (value_dims < VALUE_DIM)[None, :],
    )
