"""A runner without a model: logits follow from a token and its position, attention weights from a position alone.

Knows nothing of KV memory; what it was asked is kept for tests to look at.
Driven by an Engine in tests of what is read off a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, ScheduledSequence
from engine.config import EngineConfig
from engine.engine import Engine, Lane
from engine.kv.accounting import KVAccounting
from engine.kv.cross import CrossManager
from engine.kv.encoder_decoder import EncoderDecoderKV
from engine.kv.manager import KVManager
from engine.kv.pool import SlotPool, StorageOp, size_classes
from engine.model.chosen_ids import ChosenIds
from engine.model.runner import StepLogits
from engine.sampling.sampler import Sampler
from engine.sequence import Sequence
from tests import zoo

VOCAB_SIZE = zoo.VOCAB_SIZE
NUM_HEADS = 3
_TABLE = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(11)) * 2


def logits_at(sequence: Sequence, position: int) -> Tensor:
    """Logits [V] after the token at `position`."""
    return logits_after(sequence.token_slice(position, position + 1)[0], position)


def logits_after(token_id: int, position: int) -> Tensor:
    """Logits [V] after a token at `position`."""
    return _TABLE[token_id] * (1 + position / 50)


def weights_at(position: int, num_positions: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Where the heads look from the prompt's token at `position`: float32 [NUM_HEADS, num_positions]."""
    heads, places = np.arange(NUM_HEADS)[:, None], np.arange(num_positions)[None]
    return (heads * 1000 + position + places / 16).astype(np.float32)


def _logits_ahead(item: ScheduledSequence, chosen_ids: ChosenIds) -> Tensor:
    """Logits [V] after a token that is not known yet."""
    assert item.start == item.sequence.num_tokens, "a token that is known was taken from the device"
    return logits_after(int(chosen_ids.inputs_for([item])[0, 0]), item.start)


class ScriptedRunner:
    """See the module.

    `nan_at` holds (sequence id, position) pairs whose logits are NaN; `is_aligning` False is a model that cannot.
    """

    name = "scripted"
    can_run_ahead = True

    def __init__(self) -> None:
        self.nan_at: set[tuple[int, int]] = set()
        self.is_aligning = True
        self.asked: list[tuple[int, int, int, int]] = []  # sequence id, start, tokens, logits

    def apply(self, ops: Iterable[StorageOp]) -> None:
        """Nothing to store."""

    def forward(self, batch: Batch, chosen_ids: ChosenIds | None = None) -> StepLogits:
        """The script's logits; an aligning sequence gains its chunk."""
        rows = [torch.empty(0, VOCAB_SIZE)]
        for item in batch.items:
            sequence = item.sequence
            self.asked.append((sequence.sequence_id, item.start, item.num_tokens, item.num_logits))
            for position in range(item.stop - item.num_logits, item.stop):
                is_nan = (sequence.sequence_id, position) in self.nan_at
                logits = logits_at(sequence, position) if chosen_ids is None else _logits_ahead(item, chosen_ids)
                rows.append(logits[None] * (float("nan") if is_nan else 1.0))
            if self.is_aligning and sequence.params.is_aligning:
                assert sequence.source is not None
                weights = [weights_at(p, sequence.source.num_positions) for p in range(item.start, item.stop)]
                sequence.alignment.append(np.stack(weights, axis=1))
        return StepLogits(batch.items, torch.cat(rows))

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""

    def reset(self) -> None:
        """Nothing is kept."""


def scripted_engine(**limits: Any) -> tuple[Engine, ScriptedRunner]:
    """An engine around one, with slots that are only accounted for; keyword arguments are EngineConfig's."""
    config = EngineConfig(**{"max_num_seqs": 8, "max_batch_tokens": 256, "max_model_len": 256, **limits})
    own = KVManager(SlotPool(size_classes(16, 256), 16, None), is_prefix_caching=config.is_prefix_caching)
    kv: KVAccounting = own
    if config.max_source_len is not None:
        cross = CrossManager(SlotPool((config.max_source_len,), 16, None), is_caching=True)
        kv = EncoderDecoderKV(own, cross, positions_per_token=1.0)
    runner = ScriptedRunner()
    sampler = Sampler(VOCAB_SIZE, config.eos_token_ids, "cpu", is_deferring=config.is_overlapped)
    return Engine(config, Lane("scripted", "a test", 1), runner, kv, sampler), runner
