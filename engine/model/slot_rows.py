"""Single-token rows whose slots and lengths only the device knows: what a captured step attends to.

Knows nothing of capturing, models or steps; the reference is what model/inputs.py and model/cross_attention.py make.
Laid out by model/seq2seq.py, put on the device by graphs/slot_scene.py, read once a layer by model/attention.py.

Nothing here depends on a value that the host reads: each row takes its whole slot, and a mask hides what is not its
own. That costs a copy of K and V a layer, which steps over slots that the host knows do without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.batch import Batch, ScheduledSequence
from engine.kv.pool import Slot
from engine.kv.slots import Arena
from engine.model.paged_inputs import Ids
from engine.model.relative_bias import decode_bias
from engine.sequence import Sequence

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

NUM_COLUMNS = 6  # of a SlotLayout


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """A decode step of an encoder-decoder as the host knows it.

    Args:
        items: the sequences, one token each.
        columns: int64 [NUM_COLUMNS, R]: token ids, positions, slots, keys there, slots of sources, positions there.
        logit_rows: int64, the tokens whose logits are wanted.
    """

    items: tuple[ScheduledSequence, ...]
    columns: Ids
    logit_rows: Ids

    @property
    def input_ids(self) -> Ids:
        """Int64 [R]; 0 for a token that only the device knows."""
        ids: Ids = self.columns[0]
        return ids


def lay_out_rows(
    batch: Batch, slot_of: Callable[[Sequence], Slot], source_slot_of: Callable[[Sequence], Slot]
) -> SlotLayout | None:
    """Lay a batch out; None where it is more than single tokens, or wants more of attention than its result."""
    if any(item.num_tokens > 1 or item.sequence.params.is_aligning for item in batch.items):
        return None
    rows = []
    for item in batch.items:
        sequence = item.sequence
        assert sequence.source is not None  # checked when it was added
        slots = slot_of(sequence).index, source_slot_of(sequence).index
        rows.append((item.token_ids[0], item.start, slots[0], item.stop, slots[1], sequence.source.num_positions))
    wanted = [row for row, item in enumerate(batch.items) if item.num_logits]
    return SlotLayout(batch.items, np.array(rows, np.int64).T, np.array(wanted, np.int64))


@dataclass(frozen=True, slots=True)
class SlotRows:
    """One step's rows, each with a slot of one arena. Masks are made once a step.

    Args:
        arena: all its slots.
        slots: int64 [B].
        lengths: int64 [B], positions of the slot that a row sees; in its own slot the last of them is its own.
    """

    arena: Arena
    slots: torch.Tensor
    lengths: torch.Tensor
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _bias_masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a layer's K and V [B, Hkv, D] to each row's last position; rows that only fill the step meet in one."""
        self.arena.keys[layer][self.slots, :, self.lengths - 1] = keys
        self.arena.values[layer][self.slots, :, self.lengths - 1] = values

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        attend: Attend,
        window: int | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, H, Dk] over the rows' slots: [B, H, Dv].

        Args:
            layer: of the arena.
            query: of one token each.
            attend: attention of [B, Hkv, G, Dk] over [B, Hkv, C, Dk] and [B, Hkv, C, Dv] under a mask.
            window: positions at the end of each row's that are seen; None for all.
            bias: [H, N] by distance, added to the scores.
        """
        keys = self.arena.keys[layer].index_select(0, self.slots)  # [B, Hkv, C, Dk]
        values = self.arena.values[layer].index_select(0, self.slots)
        num_rows, num_heads, _ = query.shape
        packed = query.reshape(num_rows, keys.shape[1], -1, query.shape[2])
        mask = self._mask(keys.shape[2], window) if bias is None else self._bias_mask(keys, bias)
        return attend(packed, keys, values, mask).reshape(num_rows, num_heads, -1)

    def _mask(self, capacity: int, window: int | None) -> torch.Tensor:
        """Bool [B, 1, 1, C], true where a position is seen."""
        if window not in self._masks:
            positions, lengths = torch.arange(capacity, device=self.lengths.device), self.lengths[:, None]
            mask = positions < lengths
            if window is not None:
                mask &= positions >= lengths - window
            self._masks[window] = mask[:, None, None]
        return self._masks[window]

    def _bias_mask(self, keys: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The bias by true distance, -inf where nothing is seen: [B, Hkv, G, C] of the table's dtype."""
        if id(table) not in self._bias_masks:
            self._bias_masks[id(table)] = decode_bias(table, self.lengths, keys.shape[2], keys.shape[1])
        return self._bias_masks[id(table)]
