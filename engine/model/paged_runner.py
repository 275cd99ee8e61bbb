"""The flat lane over paged KV: one forward for one batch, K and V in blocks.

Knows nothing of scheduling policy, sampling or text.
Called by engine.py once a step, in the place of model/runner.py's FlatRunner, whose slots are its reference.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from engine.batch import Batch
from engine.kv.paged import PagedStorage
from engine.kv.pool import CrossOp, StorageOp
from engine.model.chosen_ids import ChosenIds
from engine.model.paged_inputs import PagedInputs, PagedLayout, lay_out
from engine.model.paged_step import PagedStep
from engine.model.runner import CapturedSteps, FlatModel, StepLogits, StepProgram
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.model.paged_step import PagedAttention


class PagedRunner:
    """Runs every token of a step in one forward, KV in blocks.

    Args:
        model: a causal LM whose attention implementation is set to model/attention.py's.
        storage: the blocks' tensors.
        table_of: the block table of a running sequence.
        attention: the kernel or its twin.
        device: where inputs go.
    """

    name = "flat"
    can_run_ahead = True

    def __init__(
        self,
        model: Any,
        storage: PagedStorage,
        table_of: Callable[[Sequence], array[int]],
        attention: PagedAttention,
        device: torch.device,
    ) -> None:
        self.storage = storage
        self.table_of = table_of
        self.attention = attention
        self.device = device
        self.program: StepProgram = FlatModel(model)
        self.captured: CapturedSteps[PagedLayout] | None = None

    def apply(self, ops: Iterable[StorageOp]) -> None:
        """Resize storage as the accounting decided."""
        self.storage.apply(op for op in ops if not isinstance(op, CrossOp))

    def forward(self, batch: Batch, chosen_ids: ChosenIds | None = None) -> StepLogits:
        """Compute a batch; the blocks of its sequences gain its tokens' K and V.

        Returns:
            Logits [R, V] in the model's dtype, good until the next forward.
        """
        layout = lay_out(batch, self.table_of)
        input_ids = None if chosen_ids is None else chosen_ids.inputs_for(layout.items)
        logits = None
        if self.captured is not None and layout.is_decode:
            logits = self.captured.run(layout, input_ids)
        if logits is None:
            inputs = layout.to(self.device)
            logits = self.run(inputs if input_ids is None else replace(inputs, input_ids=input_ids))
        return StepLogits(layout.items, logits)

    def run(self, inputs: PagedInputs) -> torch.Tensor:
        """The model over flat inputs; logits [R, V]."""
        return self.program.run(PagedStep(inputs, self.storage, self.attention))

    def forget(self, sequence: Sequence) -> None:
        """Nothing: what a sequence owns is its blocks, and the accounting takes those back."""

    def reset(self) -> None:
        """Drop all storage."""
        self.storage.clear()
