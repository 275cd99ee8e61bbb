"""Attention over paged KV as one Triton kernel: decode and chunks of prompts, in the same form.

Knows nothing of steps or models; importable only where Triton is.
Called by model/paged_attention.py, whose plain twin says in torch what this computes.

A program takes one KV head and one tile of a sequence's queries. The query heads that share the KV head are rows of the
tile beside each other, so that K and V are read once for all of them and a single token still fills a matrix product.
It walks over the keys that the tile sees, a few blocks at a time, with the running maximum and sum of the softmax in
float32.
"""

# Triton reads annotations of kernels as its own: theirs have none.
# ruff: noqa: ANN001

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kv.prefix import BLOCK_SIZE

MAX_HEAD_DIM = 256
LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    tile_sequences: torch.Tensor,
    tile_firsts: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    num_rows: int,
) -> None:
    """Attention of the tiles' queries, written to their rows of `out`.

    Args:
        query: [T, H, Dk], any strides but 1 in the last dimension.
        keys, values: [N, BLOCK_SIZE, Hkv, D].
        out: [T, H, Dv]; mutated.
        tile_sequences, tile_firsts: int64 [tiles], a tile's sequence and its first query within it.
        query_starts, context_lens, block_tables: int64, as PagedInputs has them.
        scaling, window, softcap, sinks: as model/attention.py's AttentionCall has them; sinks [H], contiguous.
        num_rows: rows of a tile, a power of 2; a tile has num_rows // (H // Hkv) queries.
    """
    form = Form.of(query, keys, values)
    _paged_attention[tile_sequences.shape[0], keys.shape[2]](
        query,
        keys,
        values,
        out,
        query if sinks is None else sinks,
        tile_sequences,
        tile_firsts,
        query_starts,
        context_lens,
        block_tables,
        scaling,
        0.0 if softcap is None else softcap,
        0 if window is None else window,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        **form.constants(
            num_rows, has_window=window is not None, has_softcap=softcap is not None, has_sinks=sinks is not None
        ),
        **form.options,
    )


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel is compiled for: a model's heads.

    Args:
        group: query heads that share a KV head.
        key_dim, value_dim: of a head.
        itemsize: bytes of a number.
    """

    group: int
    key_dim: int
    value_dim: int
    itemsize: int

    @classmethod
    def of(cls, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Form:
        """The form that serves [T, H, Dk] over [N, BLOCK_SIZE, Hkv, Dk] and [N, BLOCK_SIZE, Hkv, Dv]."""
        return cls(query.shape[1] // keys.shape[2], keys.shape[3], values.shape[3], keys.element_size())

    @property
    def width(self) -> int:
        """Bytes of the widest padded head: what must fit an SM's fast memory many times over."""
        return max(padded(self.key_dim), padded(self.value_dim)) * self.itemsize

    @property
    def options(self) -> dict[str, Any]:
        """How Triton compiles it."""
        num_stages = 1 if self.width >= 512 and self.itemsize > 2 else 2
        return {"num_warps": 4, "num_stages": num_stages, "enable_fp_fusion": True}

    def num_rows(self, *, is_single: bool) -> int:
        """Rows of a tile: at least the heads of a group; `is_single` where tiles have one query."""
        least = max(16, int(triton.next_power_of_2(self.group)))  # matrix units take 16 rows
        if is_single or self.width >= 1024:
            return least
        return max(least, 32 if self.width >= 512 else 64)

    def constants(self, num_rows: int, *, has_window: bool, has_softcap: bool, has_sinks: bool) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {
            "GROUP": self.group,
            "ROWS": num_rows,
            "KEYS": 32 if self.width >= 512 else 64,
            "BLOCK": BLOCK_SIZE,
            "KEY_DIM": self.key_dim,
            "KEY_PAD": padded(self.key_dim),
            "VALUE_DIM": self.value_dim,
            "VALUE_PAD": padded(self.value_dim),
            "HAS_WINDOW": has_window,
            "HAS_SOFTCAP": has_softcap,
            "HAS_SINKS": has_sinks,
            # The interpreter keeps bfloat16 as 16 bits and would multiply those as integers.
            "WIDENS": not isinstance(_paged_attention, triton.JITFunction),
        }


def padded(dim: int) -> int:
    """What a head dimension takes in a tile: powers of 2 from 16 on."""
    return max(16, int(triton.next_power_of_2(dim)))


@triton.jit  # type: ignore[untyped-decorator]
def _product(left, right, WIDENS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN202
    if WIDENS:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, input_precision="ieee")


# What differs from step to step must not make Triton compile again while requests wait: it specialises on alignment.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "tile_sequences", "tile_firsts", "query_starts", "context_lens", "block_tables", "table_stride", "window",
    ]
)  # fmt: skip
def _paged_attention(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    out,
    sinks,
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
    out_stride_token,
    out_stride_head,
    table_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDENS: tl.constexpr,
) -> None:
    TILE_QUERIES: tl.constexpr = ROWS // GROUP
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tile_sequences + tile)
    first = tl.load(tile_firsts + tile)
    query_start = tl.load(query_starts + sequence)
    query_len = tl.load(query_starts + sequence + 1) - query_start
    context_len = tl.load(context_lens + sequence)
    past = context_len - query_len  # position of the sequence's first query

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
    if HAS_SINKS:
        highest = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full([ROWS], 1.0, tl.float32)  # a sink is a key of weight 1 and value 0
    else:
        highest = tl.full([ROWS], -1.0e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, VALUE_PAD], tl.float32)

    last_key = past + tl.minimum(first + TILE_QUERIES, query_len)  # past what the tile's last query sees
    first_key = last_key * 0
    if HAS_WINDOW:
        first_key = tl.maximum(past + first - window + 1, 0) // KEYS * KEYS
    table = block_tables + sequence * table_stride
    for start in range(first_key, last_key, KEYS):
        key_positions = start + tl.arange(0, KEYS)
        is_key = key_positions < last_key
        blocks = tl.load(table + key_positions // BLOCK, mask=is_key, other=0)
        key_at = blocks * key_stride_block + key_positions % BLOCK * key_stride_position + kv_head * key_stride_head
        k = tl.load(
            keys + key_at[None, :] + key_dims[:, None], mask=is_key[None, :] & (key_dims < KEY_DIM)[:, None], other=0.0
        )  # [KEY_PAD, KEYS]
        scores = _product(q, k, WIDENS) * scaling
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both infinities.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        is_seen = (key_positions[None, :] <= positions[:, None]) & is_key[None, :]
        if HAS_WINDOW:
            is_seen = is_seen & (key_positions[None, :] > positions[:, None] - window)
        scores = tl.where(is_seen, scores * LOG2_E, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        value_at = (
            blocks * value_stride_block + key_positions % BLOCK * value_stride_position + kv_head * value_stride_head
        )
        v = tl.load(
            values + value_at[:, None] + value_dims[None, :],
            mask=is_key[:, None] & (value_dims < VALUE_DIM)[None, :],
            other=0.0,
        )  # [KEYS, VALUE_PAD]
        summed = summed * shrink[:, None] + _product(weights.to(v.dtype), v, WIDENS)
        highest = new_highest
    out_at = (query_start + queries) * out_stride_token + heads * out_stride_head
    tl.store(
        out + out_at[:, None] + value_dims[None, :],
        (summed / tl.where(is_row, total, 1.0)[:, None]).to(out.dtype.element_ty),
        mask=is_row[:, None] & (value_dims < VALUE_DIM)[None, :],
    )
