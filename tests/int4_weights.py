"""What tests of int4 weights share: our kernels compiled once a run, and every kernel that this machine has.

Knows nothing of what the tests ask.
Called by tests of engine/model and of the whole server.
"""

from __future__ import annotations

import shutil
from functools import cache

import torch
from torch import Tensor

from engine.model.int4 import cpu
from engine.model.int4.cpu import CpuInt4
from engine.model.int4.hqq import Int4Weight, solve
from engine.model.int4.native import NativeInt4
from engine.model.int4.packed import PackedInt4
from engine.model.native_kernels import COMPILERS, NativeKernels, _has_instructions, load_native

HAS_CPU_KERNEL = cpu.PACK is not None and cpu.MULTIPLY is not None
CAN_COMPILE = _has_instructions() and any(map(shutil.which, COMPILERS))


@cache
def native_kernels() -> NativeKernels:
    """Our kernels; only where CAN_COMPILE."""
    kernels = load_native(None)
    assert kernels is not None, "this machine has the instructions and a compiler, and yet no kernels"
    return kernels


def kernel(name: str) -> type[PackedInt4]:
    """The kernel of that name: "torch" or "native"."""
    return CpuInt4 if name == "torch" else NativeInt4.with_kernels(native_kernels())


KERNEL_NAMES = [name for name, is_there in (("torch", HAS_CPU_KERNEL), ("native", CAN_COMPILE)) if is_there]


def some_weight(num_rows: int, num_columns: int, group_size: int, *, seed: int = 0) -> Int4Weight:
    """A random weight, quantised."""
    return solve(random(num_rows, num_columns, seed=seed) * 0.05, group_size)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
