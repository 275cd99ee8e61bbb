"""A step as the native attention reads it: where the slot of each run of tokens is, and how many keys it sees.

Knows nothing of kernels' insides or of models.
Made by model/runner.py and compile/steps.py; read by native_attention.cpp.
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
    from engine.kv.slots import Arena
    from engine.model.step import Step

NUM_FIELDS = 6  # of StepRun in native_attention.h


@contextmanager
def native_step(kernels: NativeKernels, inputs: FlatInputs) -> Iterator[None]:
    """Make a flat batch the native attention's current step while the block runs."""
    tables: dict[int, array[int]] = {}  # kept alive: what follows holds their addresses
    runs = array("q")

    def table_of(arena: Arena) -> int:
        table = tables.get(id(arena))
        if table is None:
            pairs = zip(arena.keys, arena.values, strict=True)
            table = tables[id(arena)] = array("q", [tensor.data_ptr() for pair in pairs for tensor in pair])
        return table.buffer_info()[0]

    for group in inputs.groups:
        address = table_of(group.arena)
        for token, (slot, length) in enumerate(zip(group.slots, group.lengths, strict=True), group.first):
            runs.extend((address, slot, group.capacity, length, token, 1))
    for chunk in inputs.chunks:
        capacity = chunk.arena.keys[0].shape[2]
        run = (chunk.slot, capacity, chunk.length, chunk.first, chunk.last - chunk.first)
        runs.extend((table_of(chunk.arena), *run))
    num_layers = len(next(iter(tables.values()))) // 2 if tables else 0
    num_tokens = inputs.input_ids.shape[1]
    num_runs = len(runs) // NUM_FIELDS
    header = array("q", (num_runs, num_tokens, num_layers, torch.get_num_threads(), runs.buffer_info()[0]))
    with kernels.step(header.buffer_info()[0]):
        yield


def native_attention(kernels: NativeKernels | None, step: Step) -> AbstractContextManager[None]:
    """Have the native attention serve an eager step over slots while a block runs."""
    if kernels is None or isinstance(step, PagedStep):
        return nullcontext()
    step.kernels = kernels
    return native_step(kernels, step.inputs)


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the native attention takes Q, K and V [1, H, T, D] of these kinds: whole registers, and GQA."""
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
