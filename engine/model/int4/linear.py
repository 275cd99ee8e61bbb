"""Linear layers with int4 weights, in place of the plain ones: the kernel for few rows, a dense product for many.

Knows nothing of models, solvers or files.
Made by model/quantize.py while a checkpoint is read.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor, nn

from engine.model.int4.hqq import Int4Weight
from engine.model.int4.packed import PackedInt4, Scratch
from engine.model.packed_weight import PackedModule
from engine.model.timing import time_in_turn

logger = logging.getLogger(__name__)

MEASURED_ROWS = (8, 16, 32, 64, 128, 256, 512)
_MEASURED_OUTPUTS = 1024  # of a larger weight: the ratio is the same, and a load does not wait for it


class Int4Linear(PackedModule[PackedInt4]):
    """y = x W^T + b with W in int4; stands where an nn.Linear or a Conv1D stood.

    Args:
        packed: the weight.
        bias: [out_features], may still be on the meta device and be set later; or None.
        scratch: memory for dequantised pieces.
        min_dense_rows: from how many rows on the dequantised weight is multiplied; None for never.
        is_transposed: whether the replaced module's own `weight` was [in_features, out_features] (Conv1D).
    """

    bias: nn.Parameter | None
    _is_hf_initialized = True  # transformers initialises what the checkpoint lacks

    def __init__(
        self,
        packed: PackedInt4,
        bias: nn.Parameter | None,
        *,
        scratch: Scratch,
        min_dense_rows: int | None,
        device: torch.device,
        is_transposed: bool = False,
    ) -> None:
        sizes = packed.num_rows, packed.num_columns
        super().__init__(packed, sizes, torch.bfloat16, device=device, is_transposed=is_transposed)
        self.register_parameter("bias", bias)
        self._scratch = scratch
        self._min_dense_rows = min_dense_rows
        # Some architectures initialise their children's weights, and are to leave this one alone.
        self._stand_in._is_hf_initialized = True  # type: ignore[attr-defined]

    @property
    def native_kernels(self) -> object:
        """Our own kernels, where they multiply; None elsewhere."""
        return getattr(self._packed, "kernels", None)

    @property
    def num_weights(self) -> int:
        """How many numbers the weight stands for."""
        return self.out_features * self.in_features

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight as it is kept; the bias is a parameter and not counted."""
        if self._packed is not None:
            return self._packed.num_bytes
        return self.unpack().nbytes

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to bfloat16 [..., in_features]: [..., out_features]."""
        packed = self._packed
        bias = self._parameters["bias"]  # as an attribute it would be looked up in three places
        if packed is None:
            return self._multiply_plain(x, bias)
        rows = x.reshape(-1, self.in_features).contiguous()
        if self._min_dense_rows is not None and rows.shape[0] >= self._min_dense_rows:
            y = packed.multiply_dense(rows, self._scratch)
        else:
            y = packed.multiply(rows)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], self.out_features)

    def _give_up(self, packed: PackedInt4) -> Tensor:
        logger.warning("an int4 linear %dx%d is used by its weight: dequantised", self.in_features, self.out_features)
        return packed.dequantise()

    def extra_repr(self) -> str:
        """Return what nn.Linear shows, and in which form the weight is."""
        form = "bfloat16" if self._packed is None else f"int4, groups of {self._packed.group_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={form}"


@torch.no_grad()
def measure_min_dense_rows(kernel: type[PackedInt4], weight: Int4Weight) -> int | None:
    """Return from how many rows on multiplying the dequantised weight is faster than the kernel; None for never."""
    rows = slice(0, _MEASURED_OUTPUTS)
    part = kernel(Int4Weight(weight.codes[rows], weight.scales[rows], weight.zeros[rows]))
    if not part.can_dequantise:
        return None
    scratch = Scratch()
    for num_rows in MEASURED_ROWS:
        x = torch.randn(num_rows, part.num_columns, device=weight.codes.device).bfloat16()
        kernel_s, dense_s = time_in_turn(
            partial(part.multiply, x),
            partial(part.multiply_dense, x, scratch),
        )
        if dense_s < kernel_s:
            return num_rows
    return None
