"""A linear layer whose weight lies in memory as oneDNN packs it.

Knows nothing of which layers are worth packing, or of models.
Made by model/linear.py in the place of plain linears.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from engine.model.native_kernels import PACKED_UNIT, NativeKernels
from engine.model.packed_weight import PackedModule

logger = logging.getLogger(__name__)


def _find_op(name: str) -> Callable[..., Tensor] | None:
    """Return one of oneDNN's private operators, None where this build of torch has none."""
    packet = getattr(torch.ops.mkldnn, name, None)
    op: Callable[..., Tensor] | None = getattr(packet, "default", None)
    return op


REORDER = _find_op("_reorder_linear_weight")
LINEAR = _find_op("_linear_pointwise")
_DATA_PTR = _find_op("data_ptr")
_NBYTES = _find_op("_nbytes")


class PackedLinear(PackedModule[Tensor]):
    """y = x W^T + b with W packed; stands where an nn.Linear or a Conv1D stood.

    Args:
        packed: the packed weight of [out_features, in_features].
        bias: [out_features] or None; copied.
        is_transposed: whether the replaced module's own `weight` was [in_features, out_features] (Conv1D).
    """

    def __init__(self, packed: Tensor, bias: nn.Parameter | None, *, is_transposed: bool = False) -> None:
        out_features, in_features = packed.shape
        super().__init__(packed, (out_features, in_features), packed.dtype, is_transposed=is_transposed)
        # Parameters are found by nn.Module.__getattr__, which costs more than the call; plain attributes are not.
        self._bias = None if bias is None else bias.detach().clone()
        self.bias = None if self._bias is None else nn.Parameter(self._bias, requires_grad=False)
        self.native_kernels: NativeKernels | None = None
        self._words: Tensor | None = None
        self._max_native_numel = -1

    @property
    def max_native_rows(self) -> int:
        """Up to how many rows our own kernel computes; 0 for none."""
        return 0 if self._words is None else self._max_native_numel // self.in_features

    def use_native(self, kernels: NativeKernels, max_rows: int) -> None:
        """Have our own kernel compute up to that many rows, from the packed weight's memory; 0 for none."""
        assert self._packed is not None
        self._words = packed_words(self._packed) if max_rows else None
        self.native_kernels = None if self._words is None else kernels
        self._max_native_numel = -1 if self._words is None else max_rows * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [..., in_features] of the weight's dtype: [..., out_features]."""
        packed = self._packed
        if x.numel() <= self._max_native_numel:
            return self.native_kernels.packed_multiply(x, self._words, self._bias, self.out_features)  # type: ignore
        if packed is None:
            return self._multiply_plain(x, self._bias)
        return LINEAR(x, packed, self._bias, "none", [], "")  # type: ignore[misc]

    def _give_up(self, packed: Tensor) -> Tensor:
        logger.warning("a packed linear %dx%d is used by its weight: plain again", self.in_features, self.out_features)
        self._words = None
        self._max_native_numel = -1
        return packed.to_dense()

    def extra_repr(self) -> str:
        """Return what nn.Linear shows, whether it is packed, and up to how many rows are our own kernel's."""
        is_packed, native_rows = self._packed is not None, self.max_native_rows
        return f"in_features={self.in_features}, out_features={self.out_features}, {is_packed=}, {native_rows=}"


def packed_words(packed: Tensor) -> Tensor | None:
    """A packed weight's memory as NativeKernels.packed_multiply reads it; None where it cannot be that.

    Whether it is, its products tell (_native_rows). The view does not keep `packed` alive.
    """
    if _DATA_PTR is None or _NBYTES is None or packed.shape[1] % 2:
        return None
    address, num_bytes = int(cast(int, _DATA_PTR(packed))), int(cast(int, _NBYTES(packed)))
    units = -(-packed.shape[0] // PACKED_UNIT)
    num_pairs, rest = divmod(num_bytes, units * PACKED_UNIT * 2 * packed.element_size())
    if rest or 2 * num_pairs < packed.shape[1]:
        return None
    memory = (ctypes.c_char * num_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=packed.dtype).view(units, num_pairs, PACKED_UNIT, 2)
