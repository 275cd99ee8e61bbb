"""Int4 weights for our own kernel on CPUs with AVX512-BF16, which is the fastest for any number of rows.

Knows nothing of modules; how the kernel is compiled and called is in model/native_kernels.py.
Chosen by int4/kernels.py where the kernel can be had. In graphs an operator stands for it.

A register holds 8 columns of 16 rows: in each of its 32 words four codes, which four shifts bring to the bits that a
table look-up reads. Four such blocks of rows are read as one stream, with 64 rows to a unit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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
        return type("NativeInt4", (cls,), {"kernels": kernels})

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__(weight)
        self._words = torch.empty(self.num_rows * self.num_columns // 4, dtype=torch.int16)
        self._scales = torch.empty(weight.scales.numel(), dtype=torch.bfloat16)
        self._zeros = torch.empty_like(self._scales)
        for rows in _units(self.num_rows):
            _view(self._words, rows, self.num_columns // 8, 2).copy_(_words(weight.codes[rows]))
            for kept, given in ((self._scales, weight.scales), (self._zeros, weight.zeros)):
                _view(kept, rows, given.shape[1]).copy_(_by_lane(given[rows])[..., None])

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
            return self.multiply_traced(x)
        return self.kernels.int4_multiply(x, self._words, self._scales, self._zeros, self.num_rows)

    def multiply_traced(self, x: Tensor) -> Tensor:
        """Return x W^T of x [..., K] by the operator that stands for the kernel in a graph."""
        product: Tensor = getattr(torch.ops, NAMESPACE).int4_multiply(
            x, self._words, self._scales, self._zeros, self.num_rows
        )
        return product

    def dequantise(self) -> Tensor:
        """Return the weight, bfloat16 [N, K], each value rounded once."""
        return dequantise(self._words, self._scales, self._zeros, self.num_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the kernels, and so of no class that only this process has: for whoever traces a model elsewhere."""
        return _without_kernels, (self.__dict__,)


def dequantise(words: Tensor, scales: Tensor, zeros: Tensor, num_rows: int) -> Tensor:
    """Return a weight bfloat16 [num_rows, K] from what NativeInt4 keeps of it, each value rounded once."""
    num_columns, num_groups = 4 * words.numel() // num_rows, scales.numel() // num_rows
    out = torch.empty(num_rows, num_columns, dtype=torch.bfloat16)
    for rows in _units(num_rows):
        packed = _view(words, rows, num_columns // 8, 2)
        codes = torch.stack([(packed >> shift & MAX_CODE).to(torch.int8) for shift in (0, 4, 8, 12)], dim=-2)
        # [units, K/8, blocks, lanes, 4, 2] to [units * blocks * lanes, K]
        codes = codes.permute(0, 2, 3, 1, 4, 5).reshape(-1, num_groups, num_columns // num_groups)
        scale, zero = (
            _view(values, rows, num_groups).permute(0, 2, 3, 1, 4).reshape(codes.shape[0], -1, 1)
            for values in (scales, zeros)
        )
        out[rows] = torch.addcmul(zero, (codes - MIDDLE).bfloat16(), scale).reshape(codes.shape[0], -1)
    return out


def _without_kernels(state: dict[str, Any]) -> NativeInt4:
    weight = NativeInt4.__new__(NativeInt4)
    weight.__dict__.update(state)
    return weight


def _units(num_rows: int) -> list[slice]:
    """Return the rows that fill whole units, and those of the smaller unit that may follow."""
    whole = num_rows // UNIT_ROWS * UNIT_ROWS
    return [rows for rows in (slice(0, whole), slice(whole, num_rows)) if rows.stop > rows.start]


def _view(values: Tensor, rows: slice, per_row: int, num_words: int = 1) -> Tensor:
    """Return a view of the words, scales or zeros of some units: [units, per_row, blocks, lanes, num_words].

    `per_row` is how many registers of words, or how many groups, a row has.
    """
    blocks = min(UNIT_ROWS, rows.stop - rows.start) // LANES
    part = values[rows.start * per_row * num_words : rows.stop * per_row * num_words]
    return part.view(-1, per_row, blocks, LANES, num_words)


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


def _multiply(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, num_outputs: int) -> Tensor:
    """The twin of the operator that stands for the kernel in a graph: [..., K] -> [..., N] by a plain weight."""
    return F.linear(x, dequantise(words, scales, zeros, num_outputs))


def _multiply_shape(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, num_outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], num_outputs))


_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "int4_multiply(Tensor x, Tensor words, Tensor scales, Tensor zeros, int num_outputs) -> Tensor"
)
_library.impl("int4_multiply", _multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake(f"{NAMESPACE}::int4_multiply", _multiply_shape, lib=_library)
