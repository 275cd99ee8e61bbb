"""A weight that is kept in a form of its own, and what stands for it where a model reads `module.weight` itself.

Knows nothing of the forms: model/packed_linear.py has oneDNN's, model/int4/linear.py int4.
The base of both, and known to compile/skeleton.py.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Packed = TypeVar("Packed")

_METADATA = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in ("dtype", "shape", "device", "ndim", "layout", "is_cuda", "requires_grad")
    ]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point]
)
"""What PackedWeight answers itself."""


class PackedWeight(Tensor):
    """Stands for a packed weight where a model reads `module.weight` itself.

    Its dtype, shape and device are there at no cost (T5 and Falcon look at the dtype before each call). The first
    function that needs more (Mamba multiplies by dt_proj's) gets the plain weight, and the module goes back to plain
    for good.
    """

    _owner: PackedModule[Any]

    @staticmethod
    def of(
        owner: PackedModule[Any], shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None
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


class PackedModule(nn.Module, Generic[Packed]):
    """A linear layer whose weight is in `_packed`, in a form of its own, until somebody uses its values.

    Args:
        packed: the weight of [out_features, in_features].
        sizes: out_features and in_features.
        dtype: that the weight seems to have.
        device: that it seems to be on; None for the CPU.
        is_transposed: whether the replaced module's own `weight` was [in_features, out_features] (Conv1D).
    """

    def __init__(
        self,
        packed: Packed,
        sizes: tuple[int, int],
        dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        is_transposed: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = sizes
        self._packed: Packed | None = packed
        self._plain: Tensor | None = None
        self._is_transposed = is_transposed
        shape = torch.Size(sizes[::-1] if is_transposed else sizes)
        self._stand_in = PackedWeight.of(self, shape, dtype, device)

    @abstractmethod
    def _give_up(self, packed: Packed) -> Tensor:
        """Say in the log that the packed form is given up, drop what goes with it; the weight, dense [out, in]."""

    @property
    def weight(self) -> Tensor:
        """The weight as the replaced module had it; a stand-in until somebody uses its values."""
        return self.unpack() if self._packed is None else self._stand_in

    def unpack(self) -> Tensor:
        """Go back to the plain weight for good, and return it."""
        if self._packed is not None:
            dense = self._give_up(self._packed)
            self._plain = dense.t() if self._is_transposed else dense
            self._packed = None
        assert self._plain is not None  # one of the two is always there
        return self._plain

    def _multiply_plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What forward gives when the packed form was given up."""
        weight = self.unpack()
        return F.linear(x, weight.t() if self._is_transposed else weight, bias)
