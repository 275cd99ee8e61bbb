"""Int4 weights for torch's own kernel on CUDA, of compute capability 8.0 and above; dequantised for many rows.

Knows nothing of modules, or of which way is faster at how many rows.
Chosen by int4/kernels.py. It has run on no GPU yet: what does not depend on one is tested on the CPU, and the probe of
kernels.py has the last word.

How the operator lays codes out is written nowhere: it is found out by packing codes that say where they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from engine.model.int4.hqq import MAX_CODE, MIDDLE, Int4Weight
from engine.model.int4.packed import PackedInt4, find_op, scales_and_zeros

PACK = find_op("_convert_weight_to_int4pack")
MULTIPLY = find_op("_weight_int4pack_mm")


class CudaInt4(PackedInt4):
    """A weight for the CUDA kernel, of compute capability 8.0 and above."""

    name = "torch's int4 kernel for CUDA"
    row_multiple = 8
    inner_k_tiles = 8
    column_multiple = inner_k_tiles * 16

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__(weight)
        self._packed = self._pack(weight.codes)
        self._scales_and_zeros = scales_and_zeros(weight)
        self._order = self._tile_order(weight.codes.device)

    @classmethod
    def _pack(cls, codes: Tensor) -> Tensor:
        """Pack codes as Int4Weight has them; the operator wants the even column in the high bits."""
        assert PACK is not None
        return PACK((codes << 4 | codes >> 4).contiguous(), cls.inner_k_tiles)

    @classmethod
    @cache
    def _tile_order(cls, device: torch.device) -> Tensor:
        """Return for each code of a tile, by its place in the weight, its place in the packed tile: int64 [R * C]."""
        return tile_order(cls._pack, cls.row_multiple, cls.column_multiple, device)

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return self._packed.nbytes + self._scales_and_zeros.nbytes

    @property
    def can_dequantise(self) -> bool:
        """Whether the layout is understood."""
        return True

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W^T by the kernel."""
        return MULTIPLY(x, self._packed, self.group_size, self._scales_and_zeros)  # type: ignore[misc]

    def dequantise(self) -> Tensor:
        """Return the weight, bfloat16 [N, K]."""
        shape = (self.num_rows, self.num_columns)
        codes = unpack_tiles(self._packed, self._order, shape, (self.row_multiple, self.column_multiple))
        scale, zero = self._scales_and_zeros.permute(2, 1, 0)[..., None]  # [N, K/group_size, 1] each
        grouped = codes.view(self.num_rows, -1, self.group_size).view(torch.int8) - MIDDLE
        return torch.addcmul(zero, grouped.to(torch.bfloat16), scale).view(shape)


def tile_order(pack: Callable[[Tensor], Tensor], num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Find out where an operator puts each code of a tile [num_rows, num_columns].

    Args:
        pack: takes codes as Int4Weight has them, [N, K/2].
        num_rows, num_columns: of a tile that is packed by itself.
        device: where to pack.

    Returns:
        int64 [num_rows * num_columns]: for each code of the tile, row by row, its place among the packed nibbles.
    """
    number = torch.arange(num_rows * num_columns, device=device)
    found = torch.zeros_like(number)
    for digit in range(0, 64, 4):
        if number[-1] >> digit == 0:
            break
        codes = (number >> digit & MAX_CODE).to(torch.uint8).view(num_rows, num_columns)
        found |= _nibbles(pack(codes[:, 0::2] | codes[:, 1::2] << 4)).long() << digit
    return found.argsort()


def unpack_tiles(packed: Tensor, order: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """Return the codes of a packed weight, uint8 [N, K].

    Args:
        packed: tiles one after the other, those of a block of rows together.
        order: what tile_order found.
        shape: (N, K).
        tile: (rows, columns) of a tile.
    """
    blocks = (shape[0] // tile[0], shape[1] // tile[1])
    codes = _nibbles(packed).view(*blocks, -1).index_select(-1, order)
    return codes.view(*blocks, *tile).transpose(1, 2).reshape(shape)


def _nibbles(packed: Tensor) -> Tensor:
    """Return the nibbles of a tensor's bytes, lower ones first: uint8, flat."""
    octets = packed.contiguous().view(torch.uint8).flatten()
    return torch.stack((octets & MAX_CODE, octets >> 4), dim=-1).flatten()
