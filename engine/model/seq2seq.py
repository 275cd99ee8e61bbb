"""One step of an encoder-decoder: new sources are encoded together, then all tokens run through the decoder at once.

Knows nothing of scheduling policy, sampling or text.
Called by engine.py; built from what model/seq2seq_check.py found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Series
from dataclasses import replace

import torch

from engine.batch import Batch
from engine.kv.cross import CrossManager
from engine.kv.pool import CrossOp, Slot, StorageOp
from engine.kv.slots import SlotStorage
from engine.model.chosen_ids import ChosenIds
from engine.model.cross_attention import CrossStep, build_cross
from engine.model.encoder import Encoder
from engine.model.flat_decoder import FlatDecoder
from engine.model.inputs import build_inputs
from engine.model.runner import CapturedSteps, StepLogits, StepProgram
from engine.model.slot_rows import SlotLayout, lay_out_rows
from engine.model.step import FlatStep
from engine.sequence import Sequence, Source

# Padding is wasted work: sources of a batch are at most this many times as long as the shortest.
MAX_LENGTH_RATIO = 1.5


class Seq2SeqRunner:
    """Runs an encoder-decoder flat.

    Args:
        decoder: the decoder side.
        encoder: the encoder side.
        storage: slots of the decoder's own K and V.
        cross_storage: slots of the encoder's.
        slot_of: which slot of `storage` a running sequence holds.
        cross: whose sources are where.
        alignment_heads: by decoder layer, the heads that show where in the source a token comes from.
        device: where inputs go.
    """

    name = "seq2seq"
    can_run_ahead = True

    def __init__(
        self,
        decoder: FlatDecoder,
        encoder: Encoder,
        *,
        storage: SlotStorage,
        cross_storage: SlotStorage,
        slot_of: Callable[[Sequence], Slot],
        cross: CrossManager,
        alignment_heads: Mapping[int, list[int]],
        device: torch.device,
    ) -> None:
        self.decoder = decoder
        self.program: StepProgram = decoder
        self.encoder = encoder
        self.storage = storage
        self.cross_storage = cross_storage
        self.slot_of = slot_of
        self.cross = cross
        self.alignment_heads = alignment_heads
        self.device = device
        self.captured: CapturedSteps[SlotLayout] | None = None

    def apply(self, ops: Iterable[StorageOp]) -> None:
        """Resize and copy both storages as the accounting decided."""
        for op in ops:
            if isinstance(op, CrossOp):
                self.cross_storage.apply([op.op])
            else:
                self.storage.apply([op])

    def forward(self, batch: Batch, chosen_ids: ChosenIds | None = None) -> StepLogits:
        """Encode what is new and compute the batch's tokens.

        Returns:
            Logits [R, V] in the model's dtype, good until the next forward. Aligning sequences gain their weights.
        """
        self._encode(self.cross.to_encode([item.sequence for item in batch.items]))
        layout = None if self.captured is None else lay_out_rows(batch, self.slot_of, self.cross.slot_of)
        if self.captured is not None and layout is not None:
            input_ids = None if chosen_ids is None else chosen_ids.inputs_for(layout.items)
            logits = self.captured.run(layout, input_ids)
            if logits is not None:
                return StepLogits(layout.items, logits)
        inputs = build_inputs(batch, self.slot_of, self.storage, self.device)
        if chosen_ids is not None:
            inputs = replace(inputs, input_ids=chosen_ids.inputs_for(inputs.items))
        cross = build_cross(inputs, self.cross.slot_of, self.cross_storage, self.decoder.marker, self.alignment_heads)
        logits = self.program.run(FlatStep(inputs, self.storage, cross, biases=self.decoder.biases))
        _keep_weights(cross)
        return StepLogits(inputs.items, logits)

    def forget(self, sequence: Sequence) -> None:
        """Nothing: what a sequence owns is in slots, and the accounting takes those back."""

    def reset(self) -> None:
        """Drop all storage."""
        self.storage.clear()
        self.cross_storage.clear()

    def _encode(self, wanted: Series[tuple[Source, Slot]]) -> None:
        by_length = sorted(wanted, key=lambda pair: pair[0].num_positions)
        while by_length:
            longest = by_length[0][0].num_positions * MAX_LENGTH_RATIO
            batch = [pair for pair in by_length if pair[0].num_positions <= longest]
            by_length = by_length[len(batch) :]
            hidden, mask = self.encoder.encode([source for source, _ in batch])
            for layer, (keys, values) in enumerate(self.encoder.project(hidden, mask)):
                for row, (source, slot) in enumerate(batch):
                    length = source.num_positions  # what lies beyond is padding
                    self.cross_storage.write(slot, layer, keys[row, :, :length], values[row, :, :length])
            self.cross.note_encoded([source for source, _ in batch])


def _keep_weights(cross: CrossStep) -> None:
    """Hand the alignment weights of a step to their sequences: float32 [heads, tokens, positions] each."""
    for chunk in cross.chunks:
        if chunk.weights:
            first = chunk.weights[0].device  # layers may compute on several
            weights = torch.cat([weights.to(first) for weights in chunk.weights])
            chunk.sequence.alignment.append(weights.cpu().numpy())
