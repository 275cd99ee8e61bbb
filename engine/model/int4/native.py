"""Int4 weights for our own kernel on CPUs with AVX512-BF16, which is the fastest for any number of rows.

Knows nothing of modules; how the kernel is compiled and called is in model/native_kernels.py.
Chosen by int4/kernels.py where the kernel can be had.

A register holds 8 columns of 16 rows: in each of its 32 words four codes, which four shifts bring to the bits that a
table look-up reads. Four such blocks of rows are read as one stream, with 64 rows to a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.int4.hqq import MAX_CODE, MIDDLE, Int4Weight
from engine.model.int4.packed import PackedInt4
from engine.model.native_kernels import NativeKernels

LANES = 16
UNIT_ROWS = 4 * LANES
NAMESPACE = "transformers_openai_api"


class NativeInt4(PackedInt4):
    """A weight for our kernel; `kernels` is set on the subclass that `with_kernels` makes."""

    name = "our int4 kernel for AVX512-BF16"
    row_multiple = LANES
    column_multiple = 8
    kernels: NativeKernels

    @classmethod
    def with_kernels(cls, kernels: NativeKernels) -> type[NativeInt4]:
        """Return this class, bound to a compiled library."""
        _make_operator(kernels)
        return type("NativeInt4", (cls,), {"kernels": kernels})

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__(weight)
        self._words = torch.empty(self.num_rows * self.num_columns // 4, dtype=torch.int16)
        self._scales = torch.empty(weight.scales.numel(), dtype=torch.bfloat16)
        self._zeros = torch.empty_like(self._scales)
        for rows in self._units():
            self._words_of(rows).copy_(_words(weight.codes[rows]))
            self._of_groups(self._scales, rows).copy_(_by_lane(weight.scales[rows]))
            self._of_groups(self._zeros, rows).copy_(_by_lane(weight.zeros[rows]))

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return self._words.nbytes + self._scales.nbytes + self._zeros.nbytes

    @property
    def can_dequantise(self) -> bool:
        """Never needed: one kernel is the fastest for any number of rows."""
        return False

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W^T by the kernel."""
        if torch.compiler.is_compiling():  # which sees into operators, and not into a call of a library
            operator: Tensor = getattr(torch.ops, NAMESPACE).int4_multiply(
                x, self._words, self._scales, self._zeros, self.num_rows
            )
            return operator
        return self.kernels.int4_multiply(x, self._words, self._scales, self._zeros, self.num_rows)

    def dequantise(self) -> Tensor:
        """Return the weight, bfloat16 [N, K], each value rounded once."""
        out = torch.empty(self.num_rows, self.num_columns, dtype=torch.bfloat16)
        for rows in self._units():
            codes = torch.stack(
                [(self._words_of(rows) >> shift & MAX_CODE).to(torch.int8) for shift in (0, 4, 8, 12)], dim=-2
            )
            # [units, K/8, blocks, lanes, 4, 2] to [units * blocks * lanes, K]
            codes = codes.permute(0, 2, 3, 1, 4, 5).reshape(-1, self.num_columns // self.group_size, self.group_size)
            scale, zero = (
                self._of_groups(t, rows).permute(0, 2, 3, 1).reshape(codes.shape[0], -1, 1)
                for t in (self._scales, self._zeros)
            )
            out[rows] = torch.addcmul(zero, (codes - MIDDLE).bfloat16(), scale).reshape(codes.shape[0], -1)
        return out

    def _units(self) -> list[slice]:
        """Return the rows that fill whole units, and those of the smaller unit that may follow."""
        whole = self.num_rows // UNIT_ROWS * UNIT_ROWS
        return [rows for rows in (slice(0, whole), slice(whole, self.num_rows)) if rows.stop > rows.start]

    def _words_of(self, rows: slice) -> Tensor:
        """Return a view of the words of some units: int16 [units, K/8, blocks, lanes, 2]."""
        blocks = min(UNIT_ROWS, rows.stop - rows.start) // LANES
        per_row = self.num_columns // 4
        return self._words[rows.start * per_row : rows.stop * per_row].view(-1, self.num_columns // 8, blocks, LANES, 2)

    def _of_groups(self, values: Tensor, rows: slice) -> Tensor:
        """Return a view of the scales or zeros of some units: bfloat16 [units, groups, blocks, lanes]."""
        blocks = min(UNIT_ROWS, rows.stop - rows.start) // LANES
        per_row = self.num_columns // self.group_size
        return values[rows.start * per_row : rows.stop * per_row].view(-1, per_row, blocks, LANES)


def _words(codes: Tensor) -> Tensor:
    """Return the words of some units from their codes as Int4Weight has them: int16 [units, K/8, blocks, lanes, 2].

    Four octets hold the 8 columns of a register, even ones in their low bits: gathered, they are the nibbles of the
    first word, and the odd ones those of the second.
    """
    octets = codes.view(torch.int32)  # [rows, K/8]; the column 8 k + 2 t + p is nibble 2 t + p
    words, nibbles = torch.zeros_like(octets), torch.empty_like(octets)
    for place in range(8):
        t, p = divmod(place, 2)
        torch.bitwise_right_shift(octets, 4 * place, out=nibbles)
        words |= nibbles.bitwise_and_(MAX_CODE).bitwise_left_shift_(4 * t + 16 * p)
    blocks = min(UNIT_ROWS, codes.shape[0]) // LANES
    return words.view(-1, blocks, LANES, words.shape[1], 1).permute(0, 3, 1, 2, 4).contiguous().view(torch.int16)


def _by_lane(values: Tensor) -> Tensor:
    """Return scales or zeros [rows, groups] of some units as [units, groups, blocks, lanes]."""
    blocks = min(UNIT_ROWS, values.shape[0]) // LANES
    return values.view(-1, blocks, LANES, values.shape[1]).permute(0, 3, 1, 2)


def _make_operator(kernels: NativeKernels) -> None:
    """Make the kernel an operator of torch, for whoever compiles a model; once a process, for they live in torch."""
    if hasattr(getattr(torch.ops, NAMESPACE), "int4_multiply"):
        return

    @torch.library.custom_op(f"{NAMESPACE}::int4_multiply", mutates_args=(), device_types="cpu")
    def int4_multiply(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, num_outputs: int) -> Tensor:
        return kernels.int4_multiply(x, words, scales, zeros, num_outputs)

    @int4_multiply.register_fake
    def _(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, num_outputs: int) -> Tensor:
        return x.new_empty(x.shape[0], num_outputs)
