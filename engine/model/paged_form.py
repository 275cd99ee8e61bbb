"""What the paged kernel is compiled for: a model's heads, and how they are cut into tiles.

Knows nothing of steps or of what is computed; importable only where Triton is.
Called by model/paged_kernel.py and model/paged_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from engine.kv.prefix import BLOCK_SIZE
from engine.model.paged_split import part_of, split_constants

MAX_HEAD_DIM = 256
ALIGNMENT = 16  # what Triton looks for in addresses and strides, to load many numbers at once


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel is compiled for: a model's heads.

    Args:
        num_kv_heads: of a layer.
        group: query heads that share a KV head.
        key_dim, value_dim: of a head.
        itemsize: bytes of a number.
    """

    num_kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    itemsize: int

    @classmethod
    def of(cls, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Form:
        """The form that serves [T, H, Dk] over [N, BLOCK_SIZE, Hkv, Dk] and [N, BLOCK_SIZE, Hkv, Dv]."""
        num_kv_heads = keys.shape[2]
        return cls(num_kv_heads, query.shape[1] // num_kv_heads, keys.shape[3], values.shape[3], keys.element_size())

    @property
    def width(self) -> int:
        """Bytes of the widest padded head: what must fit an SM's fast memory many times over."""
        return max(padded(self.key_dim), padded(self.value_dim)) * self.itemsize

    @property
    def tile_keys(self) -> int:
        """Keys that a program looks at together."""
        return 32 if self.width >= 512 else 64

    @property
    def tile_size(self) -> int:
        """Queries of a tile of a longer run."""
        return self.num_rows(is_single=False) // self.group

    def options(self, *, is_single: bool) -> dict[str, Any]:
        """How Triton compiles it."""
        # Three, for two loads that wait for each other: what the table says is fetched one tile before K and V.
        num_stages = 1 if self.width >= 512 and self.itemsize > 2 else 3
        return {"num_warps": 4, "num_stages": num_stages, "enable_fp_fusion": True}

    def num_rows(self, *, is_single: bool) -> int:
        """Rows of a tile: at least the heads of a group; `is_single` where tiles have one query."""
        least = max(16, int(triton.next_power_of_2(self.group)))  # matrix units take 16 rows
        if is_single or self.width >= 1024:
            return least
        return max(least, 32 if self.width >= 512 else 64)

    def constants(
        self, *, is_single: bool, is_split: bool, has_window: bool, has_softcap: bool, has_sinks: bool
    ) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        value_pad = padded(self.value_dim)
        return {
            "KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "ROWS": self.num_rows(is_single=is_single),
            "KEYS": self.tile_keys,
            "BLOCK": BLOCK_SIZE,
            "KEY_DIM": self.key_dim,
            "KEY_PAD": padded(self.key_dim),
            "VALUE_DIM": self.value_dim,
            "VALUE_PAD": value_pad,
            "IS_SINGLE": is_single,
            "IS_SPLIT": is_split,
            "HAS_WINDOW": has_window,
            "HAS_SOFTCAP": has_softcap,
            "HAS_SINKS": has_sinks,
            # The interpreter keeps bfloat16 as 16 bits and would multiply those as integers.
            "WIDENS": not isinstance(part_of, triton.JITFunction),
            **split_constants(self.group, value_pad),
        }


def padded(dim: int) -> int:
    """What a head dimension takes in a tile: powers of 2 from 16 on."""
    return max(16, int(triton.next_power_of_2(dim)))


def aligned(query: torch.Tensor) -> torch.Tensor:
    """The query [T, H, Dk] as the kernel wants it: itself, or a copy where it lies in a way that others may not.

    Triton compiles anew for each combination of what 16 divides. How a query lies may depend on how many tokens there
    are, so only two ways reach the kernel: strides that 16 divides, for heads whose dimensions 16 divides, and
    [T, H, D] without gaps.
    """
    if query.shape[2] % ALIGNMENT or query.stride(2) != 1 or query.data_ptr() % ALIGNMENT:
        is_plain = query.is_contiguous() and query.data_ptr() % ALIGNMENT == 0
        return query if is_plain else query.clone(memory_format=torch.contiguous_format)
    return query.contiguous() if any(stride % ALIGNMENT for stride in query_strides(query)) else query


def query_strides(query: torch.Tensor) -> tuple[int, int]:
    """Of tokens and heads; a dimension of size 1 may have any in torch, and has that of [T, H, D] without gaps here."""
    num_tokens, num_heads, dim = query.shape
    return (
        num_heads * dim if num_tokens == 1 else query.stride(0),
        dim if num_heads == 1 else query.stride(1),
    )
