"""Captured steps of encoder-decoders: K and V in slots, the decoder's own and those of sources.

Knows nothing of capturing or of models.
Made by engine/build.py for graphs/steps.py.

Rows that belong to nobody stand behind a step's own. Each is token 0 at position 0 of the spare slot and reads the
first position of the spare source. A trial has a slot for each row, as the steps of sequences do: it borrows the
beginnings of the first slots, whosever they are, and puts back what they held before anybody else computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import Batch
from engine.compile.trial import CAPACITY, trial_item
from engine.graphs.scene import StepInputs
from engine.graphs.static_inputs import ALIGNMENT
from engine.kv.pool import Slot
from engine.kv.slots import Arena, SlotStorage
from engine.model.cross_attention import CrossStep, build_cross
from engine.model.flat_decoder import FlatDecoder
from engine.model.inputs import FlatInputs, build_inputs
from engine.model.slot_rows import NUM_COLUMNS, SlotLayout, SlotRows, lay_out_rows
from engine.model.step import FlatStep
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SlotScene:
    """As Scene.

    Args:
        storage, cross_storage: of one arena each that never moves; the last slot of each is nobody's.
        decoder: whose steps these are.
        vocab_size: token ids are below it.
        device: where all this is.
    """

    storage: SlotStorage
    cross_storage: SlotStorage
    decoder: FlatDecoder
    vocab_size: int
    device: torch.device

    def inputs(self, size: int) -> StepInputs[SlotLayout]:
        """As Scene.inputs."""
        padding = np.zeros((NUM_COLUMNS, -(-size // ALIGNMENT) * ALIGNMENT), np.int64)
        padding[2:] = np.array([_spare_of(self.storage), 1, _spare_of(self.cross_storage), 1])[:, None]
        whole = torch.from_numpy(padding).to(self.device, copy=True)
        ids, positions, slots, lengths, source_slots, source_lengths = whole[:, :size]
        logit_rows = torch.arange(size, device=self.device)

        def fill(layout: SlotLayout, input_ids: torch.Tensor | None = None) -> None:
            num_rows = len(layout.input_ids)
            values = padding.copy()
            values[:, :num_rows] = layout.columns
            # Pinned memory is kept by its allocator until the copy is done, which may be later than the next call.
            host = torch.tensor(values, pin_memory=self.device.type == "cuda")
            whole.copy_(host, non_blocking=True)
            if input_ids is not None:
                ids[:num_rows].copy_(input_ids.view(-1))

        def step() -> FlatStep:
            rows = SlotRows(_arena_of(self.storage), slots, lengths)
            sources = SlotRows(_arena_of(self.cross_storage), source_slots, source_lengths)
            inputs = FlatInputs((), ids[None], positions[None], logit_rows, (), (), rows)
            cross = CrossStep(self.decoder.marker, (), (), {}, sources)
            return FlatStep(inputs, self.storage, cross, biases=self.decoder.biases)

        return StepInputs(fill, step)

    @contextmanager
    def trial(self, num_rows: int) -> Iterator[SlotLayout]:
        """As Scene.trial: over noise, the same each time."""
        storages = (self.storage, self.cross_storage)
        items = tuple(trial_item(row, self.vocab_size, *map(_capacity_of, storages)) for row in range(num_rows))
        layout = lay_out_rows(Batch(items), *map(_slots_in, storages))
        assert layout is not None  # single tokens
        arenas = map(_arena_of, storages)
        borrowed = [t[:num_rows, :, :CAPACITY] for arena in arenas for t in (*arena.keys, *arena.values)]
        held = [part.clone() for part in borrowed]
        generator = torch.Generator(self.device).manual_seed(0)
        try:
            for part in borrowed:
                part.normal_(generator=generator)
            yield layout
        finally:
            for part, old in zip(borrowed, held, strict=True):
                part.copy_(old)

    def eager(self, layout: SlotLayout) -> FlatStep:
        """As Scene.eager."""
        inputs = build_inputs(Batch(layout.items), _slots_in(self.storage), self.storage, self.device)
        cross = build_cross(inputs, _slots_in(self.cross_storage), self.cross_storage, self.decoder.marker, {})
        return FlatStep(inputs, self.storage, cross, biases=self.decoder.biases)


def _slots_in(storage: SlotStorage) -> Callable[[Sequence], Slot]:
    """Gives each sequence of a trial the slot of its number."""
    capacity = _capacity_of(storage)
    return lambda sequence: Slot(capacity, sequence.sequence_id)


def _arena_of(storage: SlotStorage) -> Arena:
    (arena,) = storage.arenas.values()
    return arena


def _capacity_of(storage: SlotStorage) -> int:
    (capacity,) = storage.arenas
    return capacity


def _spare_of(storage: SlotStorage) -> int:
    return _arena_of(storage).keys[0].shape[0] - 1
