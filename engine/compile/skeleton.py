"""A model without its values: what a compiler needs of it, as bytes that another process can read.

Knows nothing of compilers, steps or caches.
Written by compile/steps.py in the serving process; read by compile/worker.py, once for each graph that it traces.

Every tensor, wherever a module keeps it, is replaced by its number. Whoever reads the bytes gives the tensors: traced
ones, so that each becomes an input of the graph. The weights then exist once, in the serving process, packed or
quantised as they are, and compiled code is small and the same for all checkpoints of an architecture.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import io
import json
import pickle
import platform
import sys
from collections.abc import Sequence as Series
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.model.native_kernels import NativeKernels
from engine.model.packed_weight import PackedWeight

# What a checkpoint's config says of itself and no computation depends on.
_NAMES_IN_CONFIG = ("_name_or_path", "name_or_path", "transformers_version", "architectures")
MIN_TEXT_LENGTH = 2  # of a text whose length a graph leaves open: a length of one has a graph of its own
_ENGINE = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str


@dataclass(frozen=True, slots=True)
class SourceShape:
    """What an encoder is given of one source.

    Args:
        shape: [F, T] of a spectrogram; empty for texts, which are token ids and a mask.
        dtype: of it.
        device: where it is.
        max_length: of a text; None for spectrograms.
        vocab_size: of a text; 0 for spectrograms.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    max_length: int | None = None
    vocab_size: int = 0

    def takes(self, values: torch.Tensor) -> bool:
        """Whether code made for this takes a batch [B, F, T] or [B, L]; a text of one token has a graph of its own."""
        if self.max_length is None:
            return tuple(values.shape[1:]) == self.shape
        return MIN_TEXT_LENGTH <= values.shape[1] <= self.max_length


@dataclass(frozen=True, slots=True)
class Skeleton:
    """An object without the tensors it holds.

    Args:
        data: of the object.
        specs: of its tensors, in the order of their numbers.
        fingerprint: the same for all that compile to the same code.
        is_native: whether the process that runs the code has our own kernels.
        source: what an encoder is given; None where the object is a step.
    """

    data: bytes
    specs: tuple[TensorSpec, ...]
    fingerprint: str
    is_native: bool = False
    source: SourceShape | None = None


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if isinstance(value, PackedWeight):
            return ("stand-in", tuple(value.shape), value.dtype)
        if isinstance(value, NativeKernels):
            return ("kernels",)
        if not isinstance(value, torch.Tensor):
            return None
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return ("tensor", number)


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, tensors: Series[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensors = tensors

    def persistent_load(self, pid: tuple[Any, ...]) -> Any:
        if pid[0] == "tensor":
            return self._tensors[int(pid[1])]
        if pid[0] == "kernels":
            return None  # a graph calls operators in their place
        # Its dtype and shape are all that is ever asked for; a graph that took its values would hold a meta tensor.
        return torch.empty(pid[1], dtype=pid[2], device="meta")


def take_skeleton(
    program: Any, model: torch.nn.Module, *, is_native: bool = False, source: SourceShape | None = None
) -> tuple[Skeleton, list[torch.Tensor]]:
    """What `program`, which runs `model`, is without its tensors, and the tensors.

    Raises:
        pickle.PicklingError, TypeError, AttributeError: it holds something that no other process could have.
    """
    file = io.BytesIO()
    writer = _Writer(file)
    writer.dump(program)
    specs = tuple(_spec(tensor) for tensor in writer.tensors)
    data = file.getvalue()
    fingerprint = _fingerprint(model, specs, (is_native, source))
    return Skeleton(data, specs, fingerprint, is_native, source), writer.tensors


def put_on(skeleton: bytes, tensors: Series[torch.Tensor]) -> Any:
    """The object again, with tensors in the places of those it had. The bytes must come from take_skeleton."""
    return _Reader(skeleton, tensors).load()


def _spec(tensor: torch.Tensor) -> TensorSpec:
    shape = tuple(tensor.shape)
    # A packed weight has no strides; what stands for it in a trace is as any weight.
    stride = torch.empty(shape, device="meta").stride() if tensor.is_mkldnn else tensor.stride()
    return TensorSpec(shape, tuple(stride), tensor.dtype, str(tensor.device))


def _fingerprint(model: torch.nn.Module, specs: Series[TensorSpec], more: tuple[object, ...]) -> str:
    """Not of the bytes: the order of a set differs from process to process."""
    config = getattr(model, "config", None)
    values = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in _NAMES_IN_CONFIG}
    parts = [
        repr(model),
        json.dumps(values, sort_keys=True, default=str),
        repr(specs),
        repr(more),
        _source(type(model)),
        *(_hash_of_file(path) for path in sorted(_ENGINE.rglob("*.py"))),
        *(_hash_of_file(path) for path in sorted(_ENGINE.rglob("*.cpp"))),
        *(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")),
        f"{sys.version} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _source(model_class: type) -> str:
    """Of classes that came with a checkpoint; transformers' own are named by its version."""
    path = inspect.getsourcefile(model_class)
    return "" if path is None else _hash_of_file(Path(path))


def _hash_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
