"""A linear layer whose weight lies in memory as oneDNN packs it, and what stands for that weight elsewhere.

Knows nothing of which layers are worth packing, or of models.
Made by model/linear.py in the place of plain linears.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from engine.model.native_kernels import PACKED_UNIT, NativeKernels

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


_METADATA = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in ("dtype", "shape", "device", "ndim", "layout", "is_cuda", "requires_grad")
    ]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point]
)
"""What PackedWeight answers itself."""


class Unpackable(Protocol):
    """A module that keeps its weight in a form of its own."""

    def unpack(self) -> Tensor:
        """Go back to the plain weight for good, and return it."""


class PackedWeight(Tensor):
    """Stands for a packed weight where a model reads `module.weight` itself.

    Its dtype, shape and device are there at no cost (T5 and Falcon look at the dtype before each call). The first
    function that needs more (Mamba multiplies by dt_proj's) gets the plain weight, and the module goes back to plain
    for good.
    """

    _owner: Unpackable

    @staticmethod
    def of(
        owner: Unpackable, shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None
    ) -> PackedWeight:
        """Make the stand-in for the weight of `owner`."""
        weight = Tensor._make_wrapper_subclass(PackedWeight, shape, dtype=dtype, device=device or torch.device("cpu"))
        weight._owner = owner
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about metadata; do everything else with the plain weight."""

        def plain(value: Any) -> Any:
            return value._owner.unpack() if isinstance(value, PackedWeight) else value

        with torch._C.DisableTorchFunctionSubclass():
            if func not in _METADATA:
                args, kwargs = tree_map(plain, (args, kwargs))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse what came around __torch_function__: there are no values here."""
        raise NotImplementedError(f"{func} on a packed weight")


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed; stands where an nn.Linear or a Conv1D stood.

    Args:
        packed: the packed weight of [out_features, in_features].
        bias: [out_features] or None; copied.
        is_transposed: whether the replaced module's own `weight` was [in_features, out_features] (Conv1D).
    """

    def __init__(self, packed: Tensor, bias: nn.Parameter | None, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        # Parameters are found by nn.Module.__getattr__, which costs more than the call; plain attributes are not.
        self._bias = None if bias is None else bias.detach().clone()
        self.bias = None if self._bias is None else nn.Parameter(self._bias, requires_grad=False)
        self._packed: Tensor | None = packed
        self._plain: Tensor | None = None
        self._is_transposed = is_transposed
        shape = packed.shape[::-1] if is_transposed else packed.shape
        self._stand_in = PackedWeight.of(self, torch.Size(shape), packed.dtype)
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
            weight = self.unpack()
            return F.linear(x, weight.t() if self._is_transposed else weight, self._bias)
        return LINEAR(x, packed, self._bias, "none", [], "")  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:
        """The weight as the replaced module had it; a stand-in until somebody uses its values."""
        return self.unpack() if self._packed is None else self._stand_in

    def unpack(self) -> Tensor:
        """Go back to the plain weight for good, and return it."""
        if self._packed is not None:
            logger.warning(
                "a packed linear %dx%d is used by its weight: plain again", self.in_features, self.out_features
            )
            dense = self._packed.to_dense()
            self._plain = dense.t() if self._is_transposed else dense
            self._packed = self._words = None
            self._max_native_numel = -1
        assert self._plain is not None  # one of the two is always there
        return self._plain

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
