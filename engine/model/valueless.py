"""A model without values: every operation on the meta device, with answers where code asks for numbers.

Knows nothing of models; shapes, dtypes and devices are exact, whatever depends on values is not.
Called by model/blueprint.py and model/kv_cost.py, which want to know what a model takes before its weights exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")

_ATEN = torch.ops.aten


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers the questions about values that models and generate() ask on their way: a quiet, ordinary input.

    Zero where a number is wanted, true where all of something is (a mask without holes, no padding), every index where
    those of non-zero elements are.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute shapes as the meta device does, and make up what it refuses to."""
        kwargs = kwargs or {}
        asked = args[0] if args else None
        if isinstance(asked, torch.Tensor) and asked.device.type == "meta":
            if func is _ATEN._local_scalar_dense.default:
                return torch.zeros((), dtype=asked.dtype, device="cpu").item()
            if func is _ATEN.equal.default:
                return True
            if func is _ATEN.all.default:
                return torch.ones((), dtype=torch.bool, device="cpu")
            if func is _ATEN.nonzero.default:
                return torch.empty((asked.numel(), asked.dim()), dtype=torch.int64, device="meta")
            if func is _ATEN._to_copy.default and kwargs.get("device") == torch.device("cpu"):
                return torch.zeros(asked.shape, dtype=kwargs.get("dtype") or asked.dtype, device="cpu")
        return func(*args, **kwargs)


@contextmanager
def valueless() -> Iterator[None]:
    """Make new tensors without storage, and let code that asks for their values go on."""
    # Not inference_mode: under it a tensor's bool() never comes here as a question.
    with torch.no_grad(), META, _Answers():  # type: ignore[no-untyped-call]
        yield
