"""Carries small tensors between the host and the device, so that on CUDA the host never waits but where it says so.

Knows nothing of what they mean. On the CPU nothing is carried: the tensors are simply there.
Used by the sampler and by the builders of a step's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(values: Series[Any] | npt.NDArray[np.generic], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on the device.

    Args:
        values: numbers, nested as the tensor shall be; copied.
        dtype: of the tensor.
        device: where to.
    """
    # A copy from pageable memory would first wait for all that the device has to do. The caching allocator of pinned
    # memory keeps the source until the copy is done, though nobody else does.
    whole = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return whole.to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host, from the moment it is made; they must not be changed before wait().

    Args:
        tensors: all on one device.
    """

    def __init__(self, tensors: Series[Tensor]) -> None:
        self._tensors = list(tensors)
        self._arrival: torch.cuda.Event | None = None
        if self._tensors and self._tensors[0].is_cuda:
            # The device that the tensors are on need not be the current one.
            stream = torch.cuda.current_stream(self._tensors[0].device)
            self._tensors = [_to_pinned(tensor) for tensor in self._tensors]
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record(stream)

    def wait(self) -> list[Tensor]:
        """Return the tensors on the host, in order; blocks until the device has computed them, and no longer."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensors


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
