"""Several devices on a machine that has none: tensors of main memory that say they are elsewhere, and insist on it.

Knows nothing of models or of what is tested.
Used by tests of models that are spread: as on real devices, an operation on tensors of two of them is an error, unless
one of them is a number or the operation copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# A type that torch knows, without a library behind it to be loaded: nothing is computed by it.
DEVICE_TYPE = "meta"
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
# As on CUDA, indices may be in main memory.
_TAKES_INDICES = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


def pretend(index: int) -> torch.device:
    """The device of that number."""
    return torch.device(DEVICE_TYPE, index)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a pretended device; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def of(inner: torch.Tensor, device: torch.device) -> Elsewhere:
        """Say that `inner` is on `device`."""
        with torch.inference_mode(False):  # views of an ordinary tensor are ordinary ones there too
            made = torch.Tensor._make_wrapper_subclass(
                Elsewhere,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=device,
            )
        made.held = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r}, device={self.device})"

    def tolist(self) -> Any:
        """Values, as on any device."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute in main memory, on the one device that the arguments name."""
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes tensors on pretended devices where code asks for a device by its name."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As any operation."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    device = _device_of(func, args, kwargs)
    # Where inference mode is on, composite operations come undivided, some with a device among their arguments.
    asked = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.device)]
    if asked:
        device = asked[0]
    elif func is torch.ops.aten.copy_.default:
        device = args[0].device
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func._schema.is_mutable:
        return args[0]
    if device is None or device.type != DEVICE_TYPE:
        return found
    return tree_map(lambda value: Elsewhere.of(value, device) if isinstance(value, torch.Tensor) else value, found)


def _device_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The one device of the arguments; raises RuntimeError when they are on two."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    if func in _TAKES_INDICES:
        tensors = [t for n, t in enumerate(tensors) if n == 0 or isinstance(t, Elsewhere)]
    devices = {t.device for t in tensors if isinstance(t, Elsewhere)}
    if devices:
        devices |= {t.device for t in tensors if t.dim()}
    if len(devices) > 1 and func not in _COPIES:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {sorted(map(str, devices))}")
    return next(iter(devices), None)


def _inner(value: Any) -> Any:
    """The same in main memory."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.held if isinstance(value, Elsewhere) else value


@contextmanager
def pretended_devices() -> Iterator[None]:
    """While the block runs, pretended devices are there."""
    # torch.tensor() would go to a device below everything that can be seen here; so it makes a copy, which is seen.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with torch.no_grad(), _Factories():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
