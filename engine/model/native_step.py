"""A step as the native attention reads it: where the slot of each run of tokens is, and how many keys it sees.

Knows nothing of kernels' insides or of models.
Made by model/runner.py and compile/steps.py; read by native_attention.cpp.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.model.inputs import FlatInputs
from engine.model.native_kernels import NativeKernels
from engine.model.paged_step import PagedStep

if TYPE_CHECKING:
    from engine.kv.slots import Arena
    from engine.model.cross_attention import CrossStep
    from engine.model.step import Step

NUM_FIELDS = 6  # of StepRun in native_attention.h


class _Layout:
    """Runs of tokens, and where the K and V are that each of them sees, as native_attention.h has them."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._tables: dict[int, array[int]] = {}  # kept alive: the runs hold their addresses
        self._runs = array("q")
        self._header = array("q")

    def add(self, arena: Arena, slot: int, length: int, first: int, num_tokens: int) -> None:
        """A run of the step's tokens [first, first + num_tokens), the last of which sees `length` keys of a slot."""
        table = self._tables.get(id(arena))
        if table is None:
            pairs = zip(arena.keys, arena.values, strict=True)
            table = self._tables[id(arena)] = array("q", [tensor.data_ptr() for pair in pairs for tensor in pair])
        capacity = arena.keys[0].shape[2]
        self._runs.extend((table.buffer_info()[0], slot, capacity, length, first, num_tokens))

    def address(self) -> int:
        """Where the step is, good while this lives and nothing is added."""
        num_layers = len(next(iter(self._tables.values()))) // 2 if self._tables else 0
        num_runs, num_threads = len(self._runs) // NUM_FIELDS, torch.get_num_threads()
        self._header = array("q", (num_runs, self._num_tokens, num_layers, num_threads, self._runs.buffer_info()[0]))
        return self._header.buffer_info()[0]


@contextmanager
def native_step(kernels: NativeKernels, inputs: FlatInputs) -> Iterator[None]:
    """Make a flat batch the native attention's current step while the block runs."""
    layout = _Layout(inputs.input_ids.shape[1])
    for group in inputs.groups:
        for token, (slot, length) in enumerate(zip(group.slots, group.lengths, strict=True), group.first):
            layout.add(group.arena, slot, length, token, 1)
    for chunk in inputs.chunks:
        layout.add(chunk.arena, chunk.slot, chunk.length, chunk.first, chunk.last - chunk.first)
    with kernels.step(layout.address()):
        yield


@contextmanager
def _native_sources(kernels: NativeKernels, cross: CrossStep, num_tokens: int) -> Iterator[None]:
    """Have the native attention serve a step's cross-attention while the block runs."""
    layout = _Layout(num_tokens)
    for group in cross.groups:
        for token, slot, length in zip(group.rows.tolist(), group.slots, group.lengths, strict=True):
            layout.add(group.arena, slot, length, token, 1)
    for chunk in cross.chunks:
        layout.add(chunk.arena, chunk.slot, chunk.length, chunk.first, chunk.last - chunk.first)
    cross.native = partial(kernels.attend_sources, layout.address())
    try:
        yield
    finally:
        cross.native = None


@contextmanager
def native_attention(kernels: NativeKernels | None, step: Step) -> Iterator[None]:
    """Have the native attention serve a step over slots while a block runs, and its sources, where it has any."""
    if kernels is None or isinstance(step, PagedStep):
        yield
        return
    step.kernels = kernels
    with ExitStack() as stack:
        stack.enter_context(native_step(kernels, step.inputs))
        if step.cross is not None and all(group.rows_per_slot == 1 for group in step.cross.groups):
            # Rows that share a source are better packed: its K and V are read once for all of them.
            stack.enter_context(_native_sources(kernels, step.cross, step.inputs.input_ids.shape[1]))
        yield


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
