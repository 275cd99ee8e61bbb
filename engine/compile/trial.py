"""Decode steps that belong to nobody: what compiled code is tried on before it serves.

Knows nothing of compilers.
Made by engine/build.py for the model's lane; used by compile/steps.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.batch import Batch, ScheduledSequence
from engine.kv.pool import ResizeArena, Slot
from engine.kv.slots import LayerShape, SlotStorage
from engine.model.attention import NotFlat
from engine.model.cross_attention import build_cross
from engine.model.inputs import build_inputs
from engine.model.selfcheck import judge, row_errors
from engine.model.step import FlatStep, Step
from engine.sequence import SamplingParams, Sequence, Source

CAPACITY = 8  # positions of a trial's slots: little memory, and rows of different lengths


class Trials(Protocol):
    """What compiled code is tried on; TrialSetting makes steps over slots, PagedTrialSetting over pages."""

    def steps(self, num_rows: int) -> Callable[[], Step]:
        """Makes one and the same step of that many rows, as often as it is called."""


@dataclass(frozen=True, slots=True)
class TrialSetting:
    """What a model's steps are made of.

    Args:
        shapes: K and V of each layer.
        vocab_size: token ids are below it.
        device: where inputs go.
        cross_shapes, marker: of an encoder-decoder, its cross-attention's, see FlatDecoder.
        biases: relative biases by module.
    """

    shapes: tuple[LayerShape, ...]
    vocab_size: int
    device: torch.device
    cross_shapes: tuple[LayerShape, ...] = ()
    marker: torch.Tensor | None = None
    biases: dict[int, torch.Tensor] | None = None

    def steps(self, num_rows: int) -> Callable[[], FlatStep]:
        """Makes one and the same step of that many rows, as often as it is called."""
        storage, cross_storage = (_filled(shapes, num_rows, self.device) for shapes in (self.shapes, self.cross_shapes))
        num_positions = CAPACITY if self.cross_shapes else 0
        items = tuple(trial_item(row, self.vocab_size, CAPACITY, num_positions) for row in range(num_rows))

        def slot_of(sequence: Sequence) -> Slot:
            return Slot(CAPACITY, sequence.sequence_id)

        def make() -> FlatStep:
            inputs = build_inputs(Batch(items), slot_of, storage, self.device)
            if self.marker is None:
                return FlatStep(inputs, storage)
            cross = build_cross(inputs, slot_of, cross_storage, self.marker, {})
            return FlatStep(inputs, storage, cross, biases=self.biases or {})

        return make


def trial_item(row: int, vocab_size: int, num_tokens: int, num_positions: int) -> ScheduledSequence:
    """The last token of a sequence of 1 to CAPACITY tokens, with a source of as many positions.

    Args:
        row: also the sequence's id.
        vocab_size: token ids are below it.
        num_tokens, num_positions: most of each, if less than CAPACITY; no positions for no source.
    """
    length = 1 + (5 * row + 2) % min(num_tokens, CAPACITY)
    token_ids = [(7 * row + 11 * position + 3) % vocab_size for position in range(length)]
    source = None
    if num_positions:
        source = Source(str(row).encode(), 1 + (3 * row + 4) % min(num_positions, CAPACITY), (0,))
    sequence = Sequence(row, token_ids, SamplingParams(max_tokens=1), arrival_time_s=0.0, source=source)
    return ScheduledSequence(sequence, length - 1, 1, 1)


def compare_logits(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a row; raises NotFlat where that is more than rounding."""
    error = judge(row_errors(logits, expected), expected.dtype)
    if expected.dtype == torch.float32 and not torch.equal(logits.argmax(-1), expected.argmax(-1)):
        raise NotFlat("greedy tokens differ from the eager step's")
    return error


def _filled(shapes: tuple[LayerShape, ...], num_slots: int, device: torch.device) -> SlotStorage:
    """Slots full of random K and V."""
    storage = SlotStorage(shapes, device)
    storage.apply([ResizeArena(CAPACITY, (), num_slots)])
    generator = torch.Generator(device).manual_seed(0)
    for arena in storage.arenas.values():
        for tensor in (*arena.keys, *arena.values):
            tensor.normal_(generator=generator)
    return storage
