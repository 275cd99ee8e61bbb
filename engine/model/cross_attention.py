"""Cross-attention of a flat batch: every token looks at its own sequence's source, whose K and V lie in slots.

Knows nothing of encoders or of how slots are shared out.
Made by model/seq2seq.py once a step; called by model/attention.py once a layer.

Rows that read one source (the choices of one request, beams) are packed as query rows of its slot: its K and V are read
once for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from engine.kv.pool import Slot
from engine.kv.slots import Arena, SlotStorage
from engine.model.inputs import MAX_PADDING, FlatInputs
from engine.model.native_step import can_attend
from engine.model.slot_rows import Attend, SlotRows
from engine.sequence import Sequence
from engine.transfer import upload


@dataclass(slots=True)
class CrossGroup:
    """Single-token rows whose sources lie in one arena.

    `num_slots` slots of the arena from `first_slot` on are read as one view when `is_padded`. Row n of the group is
    flat token `rows[n]`, and query row `places[n] % rows_per_slot` of the view's slot `places[n] // rows_per_slot`.
    """

    arena: Arena
    rows: torch.Tensor  # int64 [N]
    places: torch.Tensor  # int64 [N]
    slots: list[int]  # of each row
    lengths: list[int]  # encoder positions of each row's source
    first_slot: int
    num_slots: int
    rows_per_slot: int
    max_length: int
    is_padded: bool
    is_in_order: bool  # row n is the only one of the view's slot n, for all of its slots
    mask: torch.Tensor | None  # bool [S, 1, 1, L], true where there is a source; None where all are as long as L

    def on(self, device: torch.device) -> CrossGroup:
        """The same with its tensors on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, rows=self.rows.to(device), places=self.places.to(device), mask=mask)


@dataclass(slots=True)
class CrossChunk:
    """Several tokens of one sequence, [first, last), and the slot of its source."""

    arena: Arena
    slot: int
    first: int
    last: int
    length: int
    sequence: Sequence
    weights: list[torch.Tensor] = field(default_factory=list)  # of the alignment heads, layer by layer: [h, Tq, L]


@dataclass(slots=True)
class CrossStep:
    """One step's cross-attention.

    Args:
        marker: stands for the encoder's K where the model hands K to attention: that is how the call is known.
        groups, chunks: who looks where.
        alignment_heads: by layer, which heads' weights aligning sequences want.
        captured: in a captured step, all its rows: there are no groups and chunks.
        native: our own kernel over the groups and chunks, while it serves: (query, KV heads, Dv, layer, scaling).
    """

    marker: torch.Tensor
    groups: tuple[CrossGroup, ...]
    chunks: tuple[CrossChunk, ...]
    alignment_heads: Mapping[int, list[int]]
    captured: SlotRows | None = None
    native: Callable[[torch.Tensor, int, int, int, float], torch.Tensor] | None = None
    num_calls: int = 0
    copies: dict[torch.device, tuple[CrossGroup, ...]] = field(default_factory=dict)

    def groups_on(self, device: torch.device) -> tuple[CrossGroup, ...]:
        """The groups for layers that compute on `device`; copied once a step where that is another."""
        if not self.groups or self.groups[0].rows.device == device:
            return self.groups
        if device not in self.copies:
            self.copies[device] = tuple(group.on(device) for group in self.groups)
        return self.copies[device]


def build_cross(
    inputs: FlatInputs,
    slot_of: Callable[[Sequence], Slot],
    storage: SlotStorage,
    marker: torch.Tensor,
    alignment_heads: Mapping[int, list[int]],
) -> CrossStep:
    """Say for each token of a flat batch where its source lies."""
    by_capacity: dict[int, list[tuple[int, Slot, int]]] = defaultdict(list)
    chunks = []
    first = 0
    for item in inputs.items:
        sequence, last = item.sequence, first + item.num_tokens
        assert sequence.source is not None  # checked when it was added
        slot, length = slot_of(sequence), sequence.source.num_positions
        if item.num_tokens == 1 and not sequence.params.is_aligning:
            by_capacity[slot.capacity].append((first, slot, length))
        else:
            chunks.append(CrossChunk(storage.arenas[slot.capacity], slot.index, first, last, length, sequence))
        first = last
    device = inputs.input_ids.device
    groups = tuple(_group(storage.arenas[capacity], rows, device) for capacity, rows in by_capacity.items())
    return CrossStep(marker, groups, tuple(chunks), alignment_heads)


def _group(arena: Arena, found: list[tuple[int, Slot, int]], device: torch.device) -> CrossGroup:
    found.sort(key=lambda row: row[1].index)
    rows, slots, lengths = [row[0] for row in found], [row[1].index for row in found], [row[2] for row in found]
    taken: dict[int, int] = defaultdict(int)
    number_in_slot = []
    for slot in slots:
        number_in_slot.append(taken[slot])
        taken[slot] += 1
    first_slot, rows_per_slot, max_length = slots[0], max(taken.values()), max(lengths)
    num_slots = slots[-1] + 1 - first_slot
    seen_slots = range(first_slot, first_slot + num_slots)
    length_of = dict(zip(slots, lengths, strict=True))
    is_alike = len(length_of) == num_slots and min(lengths) == max_length
    mask = None
    if not is_alike:
        all_lengths = upload([length_of.get(slot, 1) for slot in seen_slots], torch.int64, device)
        mask = (torch.arange(max_length, device=device) < all_lengths[:, None])[:, None, None, :]
    return CrossGroup(
        arena=arena,
        rows=upload(rows, torch.int64, device),
        places=upload(
            [(slot - first_slot) * rows_per_slot + number for slot, number in zip(slots, number_in_slot, strict=True)],
            torch.int64,
            device,
        ),
        slots=slots,
        lengths=lengths,
        first_slot=first_slot,
        num_slots=num_slots,
        rows_per_slot=rows_per_slot,
        max_length=max_length,
        is_padded=num_slots * max_length <= MAX_PADDING * sum(length_of.values()),
        is_in_order=slots == list(seen_slots),
        mask=mask,
    )


def attend_cross(
    step: CrossStep, query: torch.Tensor, scaling: float, attend: Attend, *, is_plain: bool = False
) -> torch.Tensor:
    """One layer's cross-attention of all tokens.

    Args:
        step: whose layers are counted by its calls.
        query: [1, H, T, Dk].
        scaling: factor on the scores.
        attend: attention of [B, Hkv, Tq, Dk] over [B, Hkv, L, Dk] and [B, Hkv, L, Dv] under a bool mask.
        is_plain: whether that is a softmax of scaled scores and nothing else.

    Returns:
        [1, T, H, Dv]. Chunks of aligning sequences gain their weights.
    """
    layer = step.num_calls
    step.num_calls += 1
    rows = query[0].transpose(0, 1)  # [T, H, Dk]
    if step.captured is not None:
        return step.captured.attend(layer, rows, attend)[None]
    arena = (step.groups or step.chunks)[0].arena
    cached_keys, cached_values = arena.keys[layer], arena.values[layer]
    if step.native is not None and is_plain and can_attend(query, cached_keys, cached_values):
        output = step.native(query, cached_keys.shape[1], cached_values.shape[3], layer, scaling)
        for chunk in step.chunks:
            _note_weights(step, chunk, layer, rows[chunk.first : chunk.last], scaling)
        return output
    output = query.new_empty((rows.shape[0], rows.shape[1], arena.values[layer].shape[3]))
    for group in step.groups_on(query.device):
        output[group.rows] = _attend_group(group, layer, rows[group.rows], attend)
    for chunk in step.chunks:
        _attend_chunk(step, chunk, layer, rows[chunk.first : chunk.last], output[chunk.first : chunk.last], attend)
        _note_weights(step, chunk, layer, rows[chunk.first : chunk.last], scaling)
    return output[None]


def _attend_group(group: CrossGroup, layer: int, rows: torch.Tensor, attend: Attend) -> torch.Tensor:
    """[N, H, Dk] -> [N, H, Dv]."""
    keys, values = group.arena.keys[layer], group.arena.values[layer]  # [S, Hkv, C, D]
    num_rows, num_heads, dim = rows.shape
    num_kv_heads = keys.shape[1]
    if not group.is_padded:
        parts = []
        for row, slot, length in zip(rows, group.slots, group.lengths, strict=True):
            packed = row.view(1, num_kv_heads, -1, dim)
            parts.append(attend(packed, keys[slot, None, :, :length], values[slot, None, :, :length], None))
        return torch.cat(parts).view(num_rows, num_heads, -1)
    num_slots, per_slot, length = group.num_slots, group.rows_per_slot, group.max_length
    if not group.is_in_order:
        whole = rows.new_zeros((num_slots * per_slot, num_heads, dim))
        whole[group.places] = rows
        rows = whole
    # The rows of a slot and the query heads of a KV head are query rows alike: [S, Hkv, R * G, Dk].
    packed = rows.view(num_slots, per_slot, num_kv_heads, -1, dim).transpose(1, 2).flatten(2, 3)
    seen = slice(group.first_slot, group.first_slot + num_slots)
    out = attend(packed, keys[seen, :, :length], values[seen, :, :length], group.mask)
    out = out.view(num_slots, num_kv_heads, per_slot, num_heads // num_kv_heads, -1).transpose(1, 2)
    out = out.reshape(num_slots * per_slot, num_heads, -1)
    return out if group.is_in_order else out[group.places]


def _attend_chunk(
    step: CrossStep, chunk: CrossChunk, layer: int, rows: torch.Tensor, output: torch.Tensor, attend: Attend
) -> None:
    """[Tq, H, Dk] into [Tq, H, Dv]."""
    keys, values = (t[layer][chunk.slot, None, :, : chunk.length] for t in (chunk.arena.keys, chunk.arena.values))
    num_queries, num_heads, dim = rows.shape
    num_kv_heads = keys.shape[1]
    packed = rows.view(num_queries, num_kv_heads, -1, dim).transpose(0, 1).flatten(1, 2)[None]
    out = attend(packed, keys, values, None)
    out = out.view(num_kv_heads, num_queries, num_heads // num_kv_heads, -1).transpose(0, 1)
    output.copy_(out.reshape(num_queries, num_heads, -1))


def _note_weights(step: CrossStep, chunk: CrossChunk, layer: int, rows: torch.Tensor, scaling: float) -> None:
    """Add the softmax weights of the heads that an aligning sequence wants of this layer: [h, Tq, L] float32."""
    if not chunk.sequence.params.is_aligning or layer not in step.alignment_heads:
        return
    heads = step.alignment_heads[layer]
    keys = chunk.arena.keys[layer][chunk.slot, :, : chunk.length]
    num_groups = rows.shape[1] // keys.shape[0]
    queries = rows[:, heads].transpose(0, 1).float()
    own_keys = keys[[head // num_groups for head in heads]].float()
    chunk.weights.append(torch.softmax(torch.matmul(queries, own_keys.transpose(1, 2)) * scaling, dim=-1))
