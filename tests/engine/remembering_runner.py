"""Runners without a model whose KV is the tokens themselves: logits follow, bit for bit, from all that is read of it.

Knows nothing of attention; inputs and storage are the real ones, over slots or over pages. What a step writes where,
and who reads what of it later, is thereby seen: one wrong, stale or poisoned position and the tokens are others.
Driven by an Engine in tests of steps that overlap.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from engine.batch import ScheduledSequence
from engine.config import EngineConfig
from engine.engine import Engine, Lane
from engine.kv.accounting import KVAccounting
from engine.kv.manager import KVManager
from engine.kv.paged import PagedStorage
from engine.kv.paged_manager import PagedManager
from engine.kv.paged_pool import BlockPool
from engine.kv.pool import SlotPool
from engine.kv.prefix import BLOCK_SIZE
from engine.kv.slots import LayerShape, SlotStorage
from engine.model.inputs import FlatInputs
from engine.model.paged_inputs import PagedInputs
from engine.model.paged_runner import PagedRunner
from engine.model.runner import FlatRunner
from engine.sampling.sampler import Sampler

VOCAB_SIZE = 256
_SHAPE = LayerShape(1, 1, 1, torch.float64)
_TABLE = torch.randn(509, VOCAB_SIZE, generator=torch.Generator().manual_seed(5)) * 2
_CPU = torch.device("cpu")
_CAPACITIES = (24, 70, 80, 128)  # little more than is asked for at first, so that long outputs move


class Poisoned(Exception):
    """Attention would have multiplied a NaN by a weight of zero."""


def logits_after(token_ids: list[float]) -> Tensor:
    """Logits [V] after those tokens."""
    state = 7
    for token_id in token_ids:
        if math.isnan(token_id):
            return torch.full((VOCAB_SIZE,), math.nan)
        state = (state * 31 + int(token_id) + 1) % 1_000_003
    return _TABLE[state % _TABLE.shape[0]]


def _wanted(item: ScheduledSequence, history: list[float]) -> list[Tensor]:
    """The rows [1, V] of logits that an item wants."""
    return [logits_after(history[:stop])[None] for stop in range(item.stop - item.num_logits + 1, item.stop + 1)]


class _Faults:
    """What goes wrong: (sequence id, position) pairs whose K and logits are NaN, or at which the forward raises."""

    def __init__(self) -> None:
        self.nan_at: set[tuple[int, int]] = set()
        self.raise_at: set[tuple[int, int]] = set()

    def value_at(self, item: ScheduledSequence, position: int, token_id: int) -> float:
        """What is written to KV for a token."""
        place = (item.sequence.sequence_id, position)
        if place in self.raise_at:
            raise RuntimeError("boom")
        return math.nan if place in self.nan_at else float(token_id)


class RememberingSlots(FlatRunner):
    """Over slots."""

    faults: _Faults

    def run(self, inputs: FlatInputs) -> Tensor:
        """Write the tokens, then read all that came before them."""
        ids, first, rows = inputs.input_ids[0].tolist(), 0, [torch.empty(0, VOCAB_SIZE)]
        for item in inputs.items:
            slot = self.slot_of(item.sequence)
            kept = self.storage.arenas[slot.capacity].keys[0][slot.index, 0, :, 0]
            for position in range(item.start, item.stop):
                kept[position] = self.faults.value_at(item, position, ids[first])
                first += 1
            # All of a slot is read, under a mask.
            if kept[item.stop :].isnan().any():
                raise Poisoned
            history = kept.tolist()
            rows += [
                logits_after(history[:stop])[None] for stop in range(item.stop - item.num_logits + 1, item.stop + 1)
            ]
        return torch.cat(rows)


class RememberingPages(PagedRunner):
    """Over pages."""

    faults: _Faults

    def run(self, inputs: PagedInputs) -> Tensor:
        """Write the tokens, then read all that came before them."""
        kept = self.storage.keys[0].view(-1)
        ids, places = inputs.input_ids[0].tolist(), inputs.slot_mapping.tolist()
        first, rows = 0, [torch.empty(0, VOCAB_SIZE)]
        for row, item in enumerate(inputs.items):
            for position in range(item.start, item.stop):
                kept[places[first]] = self.faults.value_at(item, position, ids[first])
                first += 1
            table = inputs.block_tables[row]
            history = self.storage.keys[0][table].view(-1)[: item.stop].tolist()
            rows += [
                logits_after(history[:stop])[None] for stop in range(item.stop - item.num_logits + 1, item.stop + 1)
            ]
        return torch.cat(rows)


def remembering_engine(kind: str, budget_tokens: int | None = None, **limits: Any) -> tuple[Engine, _Faults]:
    """An engine over "slots" or "pages"; keyword arguments are EngineConfig's."""
    config = EngineConfig(**{"max_num_seqs": 4, "max_batch_tokens": 64, "max_model_len": 128, **limits})
    sampler = Sampler(VOCAB_SIZE, config.eos_token_ids, "cpu", is_deferring=config.is_overlapped)
    faults, model = _Faults(), torch.nn.Identity()
    runner: RememberingSlots | RememberingPages
    kv: KVAccounting
    if kind == "slots":
        kv = slots = KVManager(SlotPool(_CAPACITIES, 8, budget_tokens), is_prefix_caching=True)
        runner = RememberingSlots(model, SlotStorage([_SHAPE], _CPU), slots.slot_of, _CPU)
    else:
        most = 100 if budget_tokens is None else budget_tokens // BLOCK_SIZE
        kv = pages = PagedManager(BlockPool(most), is_prefix_caching=True)
        runner = RememberingPages(model, PagedStorage([_SHAPE], _CPU), pages.table_of, lambda *_: torch.empty(0), _CPU)
    runner.faults = faults
    return Engine(config, Lane("flat", "a test", 1), runner, kv, sampler), faults
