"""Int4 weights for torch's own kernel on CPUs, any CPU; dequantised piece by piece for many rows.

Knows nothing of modules, or of which way is faster at how many rows.
Chosen by int4/kernels.py where our own kernel (int4/native.py) cannot be had.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from engine.model.int4.hqq import MAX_CODE, MIDDLE, Int4Weight
from engine.model.int4.packed import PackedInt4, Scratch, find_op, scales_and_zeros

PACK = find_op("_convert_weight_to_int4pack_for_cpu")
MULTIPLY = find_op("_weight_int4pack_mm_for_cpu")

CHUNK_WEIGHTS = 2**22
"""Dequantised at a time: the 8 MiB of it are multiplied while they are in the cache."""


class CpuInt4(PackedInt4):
    """A weight for the CPU's kernel.

    It multiplies in float32 registers: 1.5 to 2.5 times as fast as packed bfloat16 at one row, half as fast at 16.
    """

    name = "torch's int4 kernel for CPUs"
    row_multiple = 16

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__(weight)
        assert PACK is not None  # kernels.py has looked
        self._packed = PACK(weight.unpack().int(), 1)  # uint8 [N, K/2], in blocks of rows
        self._scales_and_zeros = scales_and_zeros(weight)
        self._block = block_rows()

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return self._packed.nbytes + self._scales_and_zeros.nbytes

    @property
    def can_dequantise(self) -> bool:
        """Whether the rows fill whole blocks; the last, smaller one is laid out otherwise."""
        return self._block is not None and self.num_rows % self._block == 0

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W^T by the kernel."""
        return MULTIPLY(x, self._packed, self.group_size, self._scales_and_zeros)  # type: ignore[misc]

    def dequantise(self) -> Tensor:
        """Return the weight, bfloat16 [N, K]."""
        out = torch.empty(self.num_columns, self.num_rows, dtype=torch.bfloat16)
        self._dequantise_transposed(0, out)
        return out.t().contiguous()

    def multiply_dense(self, x: Tensor, scratch: Scratch) -> Tensor:
        """Return x W^T, a piece of the weight after the other."""
        assert self._block is not None
        step = max(1, CHUNK_WEIGHTS // self.num_columns // self._block) * self._block
        out = x.new_empty(x.shape[0], self.num_rows)
        for first in range(0, self.num_rows, step):
            last = min(first + step, self.num_rows)
            piece = scratch.take(self.num_columns, last - first, x.device)
            self._dequantise_transposed(first, piece)
            if last - first == self.num_rows:
                return torch.mm(x, piece, out=out)
            out[:, first:last] = x @ piece
        return out

    def _dequantise_transposed(self, first: int, out: Tensor) -> None:
        """Write rows `first` and following, as many as `out` bfloat16 [K, rows] has columns; both at whole blocks."""
        assert self._block is not None
        half, num_groups = self._block // 2, self.num_columns // self.group_size
        last = first + out.shape[1]
        num_blocks = out.shape[1] // self._block
        packed = self._packed[first:last].view(num_blocks, num_groups, self.group_size, half)
        # [blocks, groups, columns of a group, halves of a block, rows of a half]
        by_block = out.view(num_groups, self.group_size, num_blocks, 2, half).permute(2, 0, 1, 3, 4)
        # Subtracted as bytes, which wrap around and are then read with their sign.
        by_block[:, :, :, 0] = (packed & MAX_CODE).sub_(MIDDLE).view(torch.int8)
        by_block[:, :, :, 1] = (packed >> 4).sub_(MIDDLE).view(torch.int8)
        scale, zero = self._scales_and_zeros[:, None, first:last].unbind(-1)
        grouped = out.view(num_groups, self.group_size, last - first)
        torch.addcmul(zero.contiguous(), grouped, scale.contiguous(), out=grouped)  # in float32, rounded once


@cache
def block_rows() -> int | None:
    """Return how many rows the CPU's kernel packs together on this machine, None where it is none of the known ways.

    A byte of a block of B rows holds a column of the rows r and r + B/2.
    """
    assert PACK is not None
    codes = torch.randint(MAX_CODE + 1, (128, 4), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = PACK(codes, 1)
    for rows in (64, 32):
        halves = codes.to(torch.uint8).view(-1, 2, rows // 2, 4).permute(1, 0, 3, 2)
        if torch.equal(packed.flatten(), (halves[0] | halves[1] << 4).flatten()):
            return rows
    return None
