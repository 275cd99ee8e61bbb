"""The tensors behind KV blocks: one pair a layer, resized as the accounting says.

Knows nothing of sequences, budgets or prefixes: kv/paged_pool.py and kv/paged_manager.py decide, this carries out.
Read and written by model/paged_attention.py during a forward; resized by model/paged_runner.py before it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.kv.pool import ResizeArena, SlotOp
from engine.kv.prefix import BLOCK_SIZE
from engine.kv.slots import LayerShape


class PagedStorage:
    """All blocks of one model: per layer, keys [N, BLOCK_SIZE, H, Dk] and values [N, BLOCK_SIZE, H, Dv], contiguous.

    The heads of a position lie side by side, as a step's K and V arrive: a token is written in one run.

    Args:
        shapes: one entry a layer.
        device: where the tensors of layers live that name no device.
        num_fixed: blocks that are allocated now, zeros, and never move; None for as many as the accounting says.
    """

    def __init__(self, shapes: Iterable[LayerShape], device: torch.device, num_fixed: int | None = None) -> None:
        self.shapes = tuple(shapes)
        self.device = device
        self.num_fixed = num_fixed
        self._drop()
        if num_fixed is not None:
            self._resize((), num_fixed)
            self.clear()

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all layers."""
        return sum(shape.bytes_per_token for shape in self.shapes)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated now."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def apply(self, ops: Iterable[SlotOp]) -> None:
        """Carry out what the accounting decided, in its order."""
        for op in ops:
            if not isinstance(op, ResizeArena):
                raise TypeError("blocks are shared, never copied or cleared")
            if self.num_fixed is not None:
                raise TypeError("these blocks are where they are for good: captured steps hold their addresses")
            self._resize(op.keep, op.num_slots)

    @torch.inference_mode()
    def clear(self) -> None:
        """Drop every tensor; make those zeros that are where they are for good."""
        if self.num_fixed is None:
            self._drop()
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def _drop(self) -> None:
        self.keys = [self._empty(0, shape, shape.key_dim) for shape in self.shapes]
        self.values = [self._empty(0, shape, shape.value_dim) for shape in self.shapes]

    def _resize(self, keep: tuple[int, ...], num_blocks: int) -> None:
        is_prefix = keep == tuple(range(len(keep)))
        rows = None if is_prefix else torch.tensor(keep, dtype=torch.int64)
        # Layer by layer, so that old and new exist twice for one layer only.
        for layer, shape in enumerate(self.shapes):
            for tensors, dim in ((self.keys, shape.key_dim), (self.values, shape.value_dim)):
                old = tensors[layer]
                new = self._empty(num_blocks, shape, dim)
                new[: len(keep)] = old[: len(keep)] if rows is None else old[rows.to(old.device)]
                tensors[layer] = new

    def _empty(self, num_blocks: int, shape: LayerShape, dim: int) -> torch.Tensor:
        # Not zeros: attention reads no position that was not written for the sequence that reads it.
        size = (num_blocks, BLOCK_SIZE, shape.num_kv_heads, dim)
        return torch.empty(size, dtype=shape.dtype, device=shape.device or self.device)
