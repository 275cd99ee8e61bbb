"""From a scheduled batch to the tensors of one flat forward: ids, positions, and where each token's KV goes.

Knows nothing of models or of how attention is computed.
Called by model/runner.py once per step; model/attention.py reads the result once per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from engine.batch import Batch, ScheduledSequence
from engine.kv.pool import Slot
from engine.kv.slots import Arena, SlotStorage
from engine.model.relative_bias import chunk_bias, decode_bias
from engine.model.slot_rows import SlotRows
from engine.sequence import Sequence
from engine.transfer import upload

MAX_PADDING = 1.3  # padded work over real work up to which one call for all rows beats one call a row


@dataclass(slots=True)
class DecodeGroup:
    """Single-token rows of one arena: flat tokens [first, last), in the order of their slots.

    `num_slots` rows of the arena are read as one view when `is_padded`; then `rows` says which of them are ours (None
    when it is all of them, in order). Masks are made once a step and window.
    """

    arena: Arena
    capacity: int
    first: int
    last: int
    slots: list[int]
    lengths: list[int]  # keys of each row, its own included
    slots_tensor: torch.Tensor  # int64 [B]
    positions: torch.Tensor  # int64 [B]
    is_padded: bool
    num_slots: int
    max_length: int
    rows: torch.Tensor | None  # int64 [B]
    lengths_tensor: torch.Tensor  # int64 [num_slots], 1 where the row is not ours
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)
    bias_masks: dict[int, torch.Tensor] = field(default_factory=dict)
    write_rows: dict[int, torch.Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> DecodeGroup:
        """The same with its tensors on another device, and masks of its own."""
        return replace(
            self,
            slots_tensor=self.slots_tensor.to(device),
            positions=self.positions.to(device),
            rows=None if self.rows is None else self.rows.to(device),
            lengths_tensor=self.lengths_tensor.to(device),
            masks={},
            bias_masks={},
            write_rows={},
        )

    def rows_to_write(self, num_kv_heads: int) -> torch.Tensor:
        """Int64 [B * H]: where each row's head goes in an arena seen as [S * H * C, D]."""
        rows = self.write_rows.get(num_kv_heads)
        if rows is None:
            heads = torch.arange(num_kv_heads, device=self.positions.device)
            rows = (self.slots_tensor[:, None] * num_kv_heads + heads) * self.capacity + self.positions[:, None]
            rows = self.write_rows[num_kv_heads] = rows.flatten()
        return rows

    def bias_mask(self, table: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """The relative bias of T5's kin, -inf where no key is: [S, Hkv, G, L] of the table's dtype."""
        mask = self.bias_masks.get(id(table))
        if mask is None:
            mask = decode_bias(table, self.lengths_tensor, self.max_length, num_kv_heads)
            self.bias_masks[id(table)] = mask
        return mask

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Bool [S, 1, 1, L], true where a key may be seen; None when every row sees every key."""
        if window not in self.masks:
            self.masks[window] = self._make_mask(window)
        return self.masks[window]

    def _make_mask(self, window: int | None) -> torch.Tensor | None:
        is_alike = self.rows is None and min(self.lengths) == self.max_length
        if is_alike and (window is None or self.max_length <= window):
            return None
        lengths = self.lengths_tensor[:, None]
        key_positions = torch.arange(self.max_length, device=lengths.device)[None]
        mask = key_positions < lengths
        if window is not None:
            mask &= key_positions >= lengths - window
        return mask[:, None, None, :]


@dataclass(slots=True)
class Chunk:
    """Several tokens of one sequence: flat tokens [first, last), at positions [start, start + last - first)."""

    arena: Arena
    slot: int
    first: int
    last: int
    start: int
    device: torch.device
    masks: dict[tuple[int | None, int, int], torch.Tensor] = field(default_factory=dict)
    bias_masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> Chunk:
        """The same with masks on another device."""
        return replace(self, device=device, masks={}, bias_masks={})

    @property
    def length(self) -> int:
        """Keys that the last token sees, its own included."""
        return self.start + self.last - self.first

    def first_key(self, window: int | None, first: int) -> int:
        """The first key that the chunk's token number `first`, and so any after it, can see."""
        return 0 if window is None else max(0, self.start + first + 1 - window)

    def mask(self, window: int | None, first: int, last: int) -> torch.Tensor:
        """What tokens [first, last) of the chunk see of the keys from first_key up to the last of them.

        Bool [last - first, keys], true where a key may be seen.
        """
        key = (window, first, last)
        if key not in self.masks:
            queries = torch.arange(self.start + first, self.start + last, device=self.device)[:, None]
            keys = torch.arange(self.first_key(window, first), self.start + last, device=self.device)[None]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self.masks[key] = mask
        return self.masks[key]

    def bias_mask(self, table: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """The relative bias of all the chunk's tokens, causal: [Hkv, G, Tq, start + Tq] of the table's dtype."""
        mask = self.bias_masks.get(id(table))
        if mask is None:
            mask = chunk_bias(table, self.start, self.last - self.first, num_kv_heads)
            self.bias_masks[id(table)] = mask
        return mask

    def within(self, num_tokens: int) -> torch.Tensor:
        """What that many tokens in a row see of each other: bool [num_tokens, num_tokens], lower triangle true."""
        key = (None, -1, num_tokens)
        if key not in self.masks:
            self.masks[key] = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=self.device).tril()
        return self.masks[key]


@dataclass(frozen=True, slots=True)
class FlatInputs:
    """The tensors of one flat step; `items` are the batch's, in the order of their tokens.

    Layers of a model that is spread compute on several devices: each device gets its copies once a step. The step of
    such a model is not captured; one that is has `captured` rows in the place of groups and chunks.
    """

    items: tuple[ScheduledSequence, ...]
    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T]
    logit_rows: torch.Tensor  # int64 [R], the tokens whose logits are wanted
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]
    captured: SlotRows | None = None
    copies: dict[torch.device, FlatInputs] = field(default_factory=dict)

    def on(self, device: torch.device) -> FlatInputs:
        """These inputs for layers that compute on `device`."""
        if device == self.input_ids.device:
            return self
        copy = self.copies.get(device)
        if copy is None:
            copy = self.copies[device] = FlatInputs(
                items=self.items,
                input_ids=self.input_ids.to(device),
                position_ids=self.position_ids.to(device),
                logit_rows=self.logit_rows.to(device),
                groups=tuple(group.on(device) for group in self.groups),
                chunks=tuple(chunk.on(device) for chunk in self.chunks),
            )
        return copy


def build_inputs(
    batch: Batch, slot_of: Callable[[Sequence], Slot], storage: SlotStorage, device: torch.device
) -> FlatInputs:
    """Lay a batch out flat: single tokens first, by arena and slot, then longer runs."""
    singles = [item for item in batch.items if item.num_tokens == 1]
    runs = [item for item in batch.items if item.num_tokens > 1]
    slots = {item.sequence.sequence_id: slot_of(item.sequence) for item in batch.items}
    singles.sort(key=lambda item: (slots[item.sequence.sequence_id].capacity, slots[item.sequence.sequence_id].index))
    items = (*singles, *runs)
    token_ids: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    chunks: list[Chunk] = []
    for item in items:
        first, stop = len(token_ids), item.start + item.num_tokens
        token_ids.extend(item.token_ids)
        positions.extend(range(item.start, stop))
        last = len(token_ids)
        logit_rows.extend(range(last - item.num_logits, last))
        if item.num_tokens > 1:
            slot = slots[item.sequence.sequence_id]
            chunks.append(Chunk(storage.arenas[slot.capacity], slot.index, first, last, item.start, device))
    return FlatInputs(
        items=items,
        input_ids=upload([token_ids], torch.int64, device),
        position_ids=upload([positions], torch.int64, device),
        logit_rows=upload(logit_rows, torch.int64, device),
        groups=_decode_groups(singles, slots, storage, device),
        chunks=tuple(chunks),
    )


def _decode_groups(
    singles: list[ScheduledSequence], slots: dict[int, Slot], storage: SlotStorage, device: torch.device
) -> tuple[DecodeGroup, ...]:
    groups = []
    first = 0
    while first < len(singles):
        capacity = slots[singles[first].sequence.sequence_id].capacity
        last = first
        indices: list[int] = []
        lengths: list[int] = []
        while last < len(singles) and slots[singles[last].sequence.sequence_id].capacity == capacity:
            indices.append(slots[singles[last].sequence.sequence_id].index)
            lengths.append(singles[last].start + 1)
            last += 1
        num_slots, max_length = indices[-1] + 1, max(lengths)
        is_padded = num_slots * max_length <= MAX_PADDING * sum(lengths)
        all_lengths = [1] * num_slots
        for index, length in zip(indices, lengths, strict=True):
            all_lengths[index] = length
        groups.append(
            DecodeGroup(
                arena=storage.arenas[capacity],
                capacity=capacity,
                first=first,
                last=last,
                slots=indices,
                lengths=lengths,
                slots_tensor=upload(indices, torch.int64, device),
                positions=upload([length - 1 for length in lengths], torch.int64, device),
                is_padded=is_padded,
                num_slots=num_slots,
                max_length=max_length,
                rows=None if num_slots == len(indices) else upload(indices, torch.int64, device),
                lengths_tensor=upload(all_lengths, torch.int64, device),
            )
        )
        first = last
    return tuple(groups)
