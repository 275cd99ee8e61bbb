"""The tensors behind KV slots: one arena a size class and layer, resized and copied as the accounting says.

Knows nothing of sequences, budgets or prefixes: kv/pool.py and kv/manager.py decide, this carries out.
Read and written by model/attention.py during a forward; resized by model/runner.py before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from engine.kv.pool import ClearSlot, CopySlot, ResizeArena, Slot, SlotOp
from engine.kv.room import grown, zeros_with_room


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one token of one layer takes: heads and head sizes of keys and values, as the model's own K and V arrive.

    So does the device: a model may be spread over several. None for the storage's own.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def bytes_by_device(shapes: Iterable[LayerShape], device: torch.device) -> dict[str, int]:
    """Bytes of one token's keys and values on each device; `device` is that of layers which name none."""
    sizes: dict[str, int] = {}
    for shape in shapes:
        name = str(shape.device or device)
        sizes[name] = sizes.get(name, 0) + shape.bytes_per_token
    return sizes


@dataclass(slots=True)
class Arena:
    """Slots of one capacity: per layer, keys [S, H, C, Dk] and values [S, H, C, Dv], contiguous."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_slots(self) -> int:
        """How many there are."""
        return self.keys[0].shape[0] if self.keys else 0


class SlotStorage:
    """All arenas of one model.

    The positions of a head lie side by side ([S, H, C, D], not [S, C, H, D]): attention reads them in one run. With 32
    KV heads of 128 it took 2.6 times as long when heads alternated, and writing a step's tokens costs the same.

    Args:
        shapes: one entry a layer.
        device: where the tensors of layers live that name no device.
        fixed: the one arena there will be, of slots that are made now and never move; None for those that the
            accounting asks for.
    """

    def __init__(self, shapes: Iterable[LayerShape], device: torch.device, fixed: ResizeArena | None = None) -> None:
        self.shapes = tuple(shapes)
        self.device = device
        self.fixed = fixed
        self.arenas: dict[int, Arena] = {}
        if fixed is not None:
            self._resize(fixed)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all layers."""
        return sum(shape.bytes_per_token for shape in self.shapes)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated now."""
        return sum(
            tensor.numel() * tensor.element_size()
            for arena in self.arenas.values()
            for tensor in (*arena.keys, *arena.values)
        )

    def apply(self, ops: Iterable[SlotOp]) -> None:
        """Carry out what the accounting decided, in its order."""
        for op in ops:
            if isinstance(op, CopySlot):
                self._copy(op)
            elif isinstance(op, ClearSlot):
                arena = self.arenas[op.slot.capacity]
                for tensor in (*arena.keys, *arena.values):
                    tensor[op.slot.index].zero_()
            elif self.fixed is None:
                self._resize(op)
            elif op.capacity != self.fixed.capacity or op.num_slots > self.fixed.num_slots:
                raise ValueError(f"{op.num_slots} slots of {op.capacity} are not among {self.fixed}")

    def write(self, slot: Slot, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill a slot of one layer from its first position on: keys [H, L, Dk], values [H, L, Dv]."""
        arena = self.arenas[slot.capacity]
        arena.keys[layer][slot.index, :, : keys.shape[1]] = keys
        arena.values[layer][slot.index, :, : values.shape[1]] = values

    @torch.inference_mode()
    def clear(self) -> None:
        """Drop every tensor; make those zeros that are where they are for good."""
        if self.fixed is None:
            self.arenas.clear()
        for arena in self.arenas.values():
            for tensor in (*arena.keys, *arena.values):
                tensor.zero_()

    def _copy(self, op: CopySlot) -> None:
        source, target = self.arenas[op.source.capacity], self.arenas[op.target.capacity]
        length = op.num_tokens
        for tensors, others in ((target.keys, source.keys), (target.values, source.values)):
            for tensor, other in zip(tensors, others, strict=True):
                tensor[op.target.index, :, :length].copy_(other[op.source.index, :, :length])

    def _resize(self, op: ResizeArena) -> None:
        if op.num_slots == 0:
            self.arenas.pop(op.capacity, None)
            return
        arena = self.arenas.setdefault(op.capacity, Arena())
        is_growth = op.keep == tuple(range(arena.num_slots)) and op.num_slots > arena.num_slots
        # Layer by layer, so that old and new exist twice for one layer only.
        for layer, shape in enumerate(self.shapes):
            for tensors, dim in ((arena.keys, shape.key_dim), (arena.values, shape.value_dim)):
                size = (op.num_slots, shape.num_kv_heads, op.capacity, dim)
                old = tensors[layer] if layer < len(tensors) else None
                new = grown(old, op.num_slots) if old is not None and is_growth else None
                if new is None:
                    # Zeros: attention multiplies masked positions by a weight of 0, and 0 * NaN would be NaN.
                    new = zeros_with_room(size, op.room, shape.dtype, shape.device or self.device)
                    if old is not None:
                        for row, old_row in enumerate(op.keep):
                            new[row].copy_(old[old_row])
                tensors[layer : layer + 1] = [new]
