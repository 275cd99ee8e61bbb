"""A decode step as the native attention reads it: where each row's slot is, and how many keys it sees.

Knows nothing of kernels' insides or of models.
Made by model/runner.py and compile/steps.py for a step of single tokens; read by native_attention.cpp.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.model.inputs import FlatInputs
from engine.model.native_kernels import NativeKernels
from engine.model.paged_step import PagedStep

if TYPE_CHECKING:
    from engine.model.step import Step


@contextmanager
def native_step(kernels: NativeKernels, inputs: FlatInputs) -> Iterator[None]:
    """Make the single tokens of a flat batch the native attention's current step while the block runs."""
    tables: list[array[int]] = []  # kept alive: what follows holds their addresses
    rows = array("q")
    num_layers = 0
    for group in inputs.groups:
        keys, values = group.arena.keys, group.arena.values
        num_layers = len(keys)
        table = array("q", [tensor.data_ptr() for pair in zip(keys, values, strict=True) for tensor in pair])
        tables.append(table)
        address = table.buffer_info()[0]
        for slot, length in zip(group.slots, group.lengths, strict=True):
            rows.extend((address, slot, group.capacity, length))
    header = array("q", (len(rows) // 4, num_layers, torch.get_num_threads(), rows.buffer_info()[0]))
    with kernels.step(header.buffer_info()[0]):
        yield


def native_attention(kernels: NativeKernels | None, step: Step) -> AbstractContextManager[None]:
    """Have the native attention serve an eager step while a block runs, where all its tokens are single ones."""
    if kernels is None or isinstance(step, PagedStep) or step.inputs.chunks or step.windows is not None:
        return nullcontext()
    step.kernels = kernels
    return native_step(kernels, step.inputs)


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the native attention takes Q, K and V [1, H, B, D] of these kinds: whole registers, and GQA."""
    multiple = {torch.bfloat16: 32, torch.float32: 16}.get(query.dtype)
    is_of_kind = multiple is not None and query.dtype == key.dtype == value.dtype and query.device.type == "cpu"
    return (
        is_of_kind
        and query.shape[3] % (multiple or 1) == 0
        and value.shape[3] % 16 == 0
        and query.shape[1] % key.shape[1] == 0
    )


def kernels_of(model: Any) -> NativeKernels | None:
    """The native kernels that a model's layers hold, None where none does."""
    for module in model.modules():
        found = getattr(module, "native_kernels", None)
        if isinstance(found, NativeKernels):
            return found
    return None
