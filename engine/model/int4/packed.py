"""What a linear layer asks of an int4 weight in a kernel's own layout, and the memory that dequantising works in.

Knows nothing of any particular kernel, of modules, or of which way is faster at how many rows.
Implemented by the other modules here, one for each kind of machine; called by int4/linear.py.

The kernels subtract 8 from a code before they scale it, so a weight is (code - 8) * scale + zero everywhere, and
repacking moves bits without rounding any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.int4.hqq import Int4Weight


def find_op(name: str) -> Callable[..., Tensor] | None:
    """Return one of torch's private operators, None where this build has none."""
    op: Callable[..., Tensor] | None = getattr(getattr(torch.ops.aten, name, None), "default", None)
    return op


class Scratch:
    """Memory for dequantised pieces, shared by the layers of a model, which run one after the other.

    Fresh memory for each would cost more than the dequantising: the system hands it out page by page.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, num_rows: int, num_columns: int, device: torch.device) -> Tensor:
        """Return bfloat16 [num_rows, num_columns] with whatever is in it; good until the next call."""
        size = num_rows * num_columns
        if self._buffer is None or self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = torch.empty(size, dtype=torch.bfloat16, device=device)
        return self._buffer[:size].view(num_rows, num_columns)


class PackedInt4(ABC):
    """One weight [N, K] in a kernel's layout.

    Args:
        weight: on the device that is to multiply.
    """

    name: ClassVar[str]
    row_multiple: ClassVar[int]
    column_multiple: ClassVar[int] = 2

    def __init__(self, weight: Int4Weight) -> None:
        self.num_rows, self.num_columns = weight.shape
        self.group_size = weight.group_size

    @classmethod
    def why_not(cls, shape: torch.Size) -> str | None:
        """Return why the kernel takes no weight [N, K] of this shape, None if it does."""
        if shape[0] % cls.row_multiple or shape[1] % cls.column_multiple:
            return f"not of {cls.row_multiple}n x {cls.column_multiple}k"
        return None

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes that are kept."""

    @property
    @abstractmethod
    def can_dequantise(self) -> bool:
        """Whether the layout is understood; where it is not, the kernel has to do for any number of rows."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """Return x W^T by the kernel: x bfloat16 [M, K], contiguous, to [M, N]; made for few rows."""

    @abstractmethod
    def dequantise(self) -> Tensor:
        """Return the weight, bfloat16 [N, K], each value rounded once."""

    def multiply_dense(self, x: Tensor, scratch: Scratch) -> Tensor:
        """Return what `multiply` does by way of the dequantised weight; made for many rows."""
        return F.linear(x, self.dequantise())


def scales_and_zeros(weight: Int4Weight) -> Tensor:
    """Return them as the kernels read them: bfloat16 [K/group_size, N, 2]."""
    return torch.stack((weight.scales.t(), weight.zeros.t()), dim=-1).contiguous()
