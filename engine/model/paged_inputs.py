"""From a scheduled batch to the tensors of one flat forward over paged KV, moved to the device in one copy.

Knows nothing of models or of how attention is computed.
Called by model/paged_runner.py once a step; model/paged_attention.py reads the result once a layer.

On the way stands a PagedLayout, all of it on the host: a captured step (engine/graphs/) copies it into tensors of its
own, which stay where they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Batch, ScheduledSequence
from engine.kv.prefix import BLOCK_SIZE
from engine.sequence import Sequence

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries cut into pieces that a kernel takes at once: for each, its sequence and its first query there."""

    sequences: torch.Tensor  # int64 [N]
    firsts: torch.Tensor  # int64 [N]


@dataclass(frozen=True, slots=True)
class NewRuns:
    """The runs that see nothing but themselves.

    Args:
        num_old: sequences before them.
        first: their first token in T; they go on to its end.
        starts: int32 [runs + 1], where each begins among them, and where the last ends.
        longest: tokens of the longest.
    """

    num_old: int
    first: int
    starts: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """The tensors of one step, all int64; single tokens come first, then longer runs, those of new sequences last.

    Args:
        items: the batch's, in the order of their tokens.
        input_ids, position_ids: [1, T].
        logit_rows: [R], the tokens whose logits are wanted.
        slot_mapping: [T], where each token's K and V go: block * BLOCK_SIZE + position in it.
        query_starts: [S + 1], each sequence's first token in T, and T.
        context_lens: [S], keys that a sequence's last token sees, its own included.
        block_tables: [S, M]; position p of a sequence is in block p // BLOCK_SIZE of its row; the rest is 0.
        num_singles: how many sequences have one token.
        query_lens, lengths: query lengths and context_lens, as numbers. In a captured step lengths are no more than
            bounds: what context_lens holds differs from replay to replay.
    """

    items: tuple[ScheduledSequence, ...]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logit_rows: torch.Tensor
    slot_mapping: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    num_singles: int
    query_lens: tuple[int, ...]
    lengths: tuple[int, ...]
    _tiles: dict[tuple[int, int], Tiles] = field(default_factory=dict)
    _new_runs: list[NewRuns | None] = field(default_factory=list)
    _copies: dict[torch.device, PagedInputs] = field(default_factory=dict)

    def on(self, device: torch.device) -> PagedInputs:
        """These inputs for layers that compute on `device`; copied once a step where that is another."""
        if device == self.input_ids.device:
            return self
        copy = self._copies.get(device)
        if copy is None:
            names = ("input_ids", "position_ids", "logit_rows", "slot_mapping", "query_starts", "context_lens",
                     "block_tables")  # fmt: skip
            tensors = {name: getattr(self, name).to(device) for name in names}
            copy = self._copies[device] = replace(self, **tensors, _tiles={}, _new_runs=[], _copies={})
        return copy

    def new_runs(self) -> NewRuns | None:
        """The longer runs that begin their sequences, where there are some; made once a step."""
        if not self._new_runs:
            lens = zip(self.query_lens, self.lengths, strict=True)
            num_old = sum(1 for query_len, length in lens if query_len == 1 or query_len < length)
            made = None
            if num_old < len(self.query_lens):
                starts = self.query_starts[num_old:]
                longest = max(self.query_lens[num_old:])
                made = NewRuns(num_old, sum(self.query_lens[:num_old]), (starts - starts[0]).int(), longest)
            self._new_runs.append(made)
        return self._new_runs[0]

    def run_tiles(self, tile_size: int, num_sequences: int) -> Tiles:
        """The longer runs of the first `num_sequences` sequences in tiles of `tile_size` tokens; made once a step."""
        tiles = self._tiles.get((tile_size, num_sequences))
        if tiles is None:
            pairs = [
                (number, first)
                for number in range(self.num_singles, num_sequences)
                for first in range(0, self.query_lens[number], tile_size)
            ]
            sequences, firsts = to_device(
                [np.array([number for number, _ in pairs]), np.array([first for _, first in pairs])],
                self.input_ids.device,
            )
            tiles = self._tiles[tile_size, num_sequences] = Tiles(sequences, firsts)
        return tiles


def build_paged_inputs(batch: Batch, table_of: Callable[[Sequence], array[int]], device: torch.device) -> PagedInputs:
    """Lay a batch out flat, with the block tables of its sequences, on the device."""
    return lay_out(batch, table_of).to(device)


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """A step as the host knows it; the fields are those of PagedInputs.

    Args:
        tables: of each sequence, the blocks that its context is in.
    """

    items: tuple[ScheduledSequence, ...]
    input_ids: Ids
    position_ids: Ids
    logit_rows: Ids
    slot_mapping: Ids
    query_lens: tuple[int, ...]
    lengths: tuple[int, ...]
    tables: tuple[Ids, ...]

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one token here."""
        return len(self.query_lens) == len(self.input_ids)

    def to(self, device: torch.device) -> PagedInputs:
        """The tensors, by one copy."""
        block_tables = np.zeros((len(self.tables), max(map(len, self.tables), default=0)), np.int64)
        for row, table in enumerate(self.tables):
            block_tables[row, : len(table)] = table
        parts = to_device(
            [
                self.input_ids,
                self.position_ids,
                self.logit_rows,
                self.slot_mapping,
                np.cumsum([0, *self.query_lens]),
                np.array(self.lengths, np.int64),
                block_tables.ravel(),
            ],
            device,
        )
        ids, places, rows, slot_mapping, query_starts, context_lens, flat_tables = parts
        return PagedInputs(
            items=self.items,
            input_ids=ids[None],
            position_ids=places[None],
            logit_rows=rows,
            slot_mapping=slot_mapping,
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables=flat_tables.view(block_tables.shape),
            num_singles=sum(1 for length in self.query_lens if length == 1),
            query_lens=self.query_lens,
            lengths=self.lengths,
        )


def lay_out(batch: Batch, table_of: Callable[[Sequence], array[int]]) -> PagedLayout:
    """Lay a batch out flat, with the block tables of its sequences."""
    items = tuple(sorted(batch.items, key=lambda item: (item.num_tokens > 1, item.num_tokens > 1 and item.start == 0)))
    tables = [np.frombuffer(table_of(item.sequence), dtype=np.int64) for item in items]
    token_ids: list[int] = []
    logit_rows: list[int] = []
    positions: list[Ids] = []
    slots: list[Ids] = []
    for item, table in zip(items, tables, strict=True):
        token_ids.extend(item.token_ids)
        logit_rows.extend(range(len(token_ids) - item.num_logits, len(token_ids)))
        own = np.arange(item.start, item.stop)
        positions.append(own)
        slots.append(table[own // BLOCK_SIZE] * BLOCK_SIZE + own % BLOCK_SIZE)
    lengths = tuple(item.stop for item in items)
    empty = [np.zeros(0, np.int64)]
    return PagedLayout(
        items=items,
        input_ids=np.array(token_ids, np.int64),
        position_ids=np.concatenate(positions or empty),
        logit_rows=np.array(logit_rows, np.int64),
        slot_mapping=np.concatenate(slots or empty),
        query_lens=tuple(item.num_tokens for item in items),
        lengths=lengths,
        tables=tuple(table[: -(-length // BLOCK_SIZE)] for table, length in zip(tables, lengths, strict=True)),
    )


def to_device(parts: list[Ids], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Several rows of int64 on the device by one copy, which on CUDA the host does not wait for."""
    sizes = [part.shape[0] for part in parts]
    whole = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(parts, out=whole.numpy())
    # The caching allocator of pinned memory keeps `whole` until the copy is done, though nobody else does.
    return torch.split(whole.to(device, non_blocking=True), sizes)
