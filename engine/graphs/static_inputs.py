"""The inputs of a captured step: tensors that stay where they are and are filled anew before each replay.

Knows nothing of capturing or of models.
Made by graphs/paged_scene.py, one for each size of steps.

Rows that belong to nobody stand behind a step's own. Each is token 0 at position 0 of a block that no sequence is
given: it writes one key there and reads that one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.kv.prefix import BLOCK_SIZE
from engine.model.paged_inputs import Ids, PagedInputs, PagedLayout

ALIGNMENT = 16  # of the tensors, in numbers of 8 bytes: kernels may be compiled for aligned addresses


@dataclass(frozen=True, slots=True)
class _Parts:
    """Where each tensor lies in the one that is copied."""

    input_ids: slice
    position_ids: slice
    slot_mapping: slice
    context_lens: slice
    block_tables: slice
    total: int

    @classmethod
    def of(cls, size: int, table_width: int) -> _Parts:
        row = -(-size // ALIGNMENT) * ALIGNMENT
        ids, positions, slots, lens = (slice(number * row, number * row + size) for number in range(4))
        tables = slice(4 * row, 4 * row + size * table_width)
        return cls(ids, positions, slots, lens, tables, tables.stop)


class StaticInputs:
    """Inputs of steps of up to `size` single tokens.

    Args:
        size: rows.
        table_width: blocks of the longest sequence.
        spare_block: where rows that belong to nobody write.
        device: where the tensors are.
    """

    def __init__(self, size: int, table_width: int, spare_block: int, device: torch.device) -> None:
        self.size = size
        self._table_width = table_width
        self._parts = _Parts.of(size, table_width)
        self._padding = self._pad(spare_block)
        self._whole = torch.from_numpy(self._padding).to(device, copy=True)
        self.inputs = self._view(self._whole)

    def fill(self, layout: PagedLayout, input_ids: torch.Tensor | None = None) -> None:
        """Put a step's values in, by one copy that the host does not wait for.

        Args:
            layout: of a decode step of at most `size` sequences.
            input_ids: int64 [B] or [1, B] on the device, in the place of the layout's: tokens that the host does not
                know yet.
        """
        parts, num_rows = self._parts, len(layout.input_ids)
        # New each time: the caching allocator of pinned memory keeps it until the copy is done, which may be later
        # than the next call.
        host = torch.empty(parts.total, dtype=torch.int64, pin_memory=self._whole.device.type == "cuda")
        values = host.numpy()
        values[:] = self._padding
        for part, ours in (
            (parts.input_ids, layout.input_ids),
            (parts.position_ids, layout.position_ids),
            (parts.slot_mapping, layout.slot_mapping),
            (parts.context_lens, layout.lengths),
        ):
            values[part][:num_rows] = ours
        tables = values[parts.block_tables].reshape(self.size, self._table_width)
        for row, table in enumerate(layout.tables):
            tables[row, : len(table)] = table
        self._whole.copy_(host, non_blocking=True)
        if input_ids is not None:
            self.inputs.input_ids[:, :num_rows].copy_(input_ids)

    def _pad(self, spare_block: int) -> Ids:
        values = np.zeros(self._parts.total, np.int64)
        values[self._parts.slot_mapping] = spare_block * BLOCK_SIZE
        values[self._parts.context_lens] = 1
        values[self._parts.block_tables].reshape(self.size, self._table_width)[:, 0] = spare_block
        return values

    def _view(self, whole: torch.Tensor) -> PagedInputs:
        parts = self._parts
        return PagedInputs(
            items=(),
            input_ids=whole[parts.input_ids][None],
            position_ids=whole[parts.position_ids][None],
            logit_rows=torch.arange(self.size, device=whole.device),
            slot_mapping=whole[parts.slot_mapping],
            query_starts=torch.arange(self.size + 1, device=whole.device),
            context_lens=whole[parts.context_lens],
            block_tables=whole[parts.block_tables].view(self.size, self._table_width),
            num_singles=self.size,
            query_lens=(1,) * self.size,
            lengths=(self._table_width * BLOCK_SIZE,) * self.size,
        )
