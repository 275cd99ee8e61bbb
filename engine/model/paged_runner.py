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

from engine.kv.paged import PagedStorage
from engine.kv.pool import CrossOp, StorageOp
from engine.model.chosen_ids import ChosenIds
from engine.model.paged_inputs import PagedInputs, build_paged_inputs
from engine.model.paged_step import PagedStep
from engine.model.runner import StepLogits, accepts
from engine.model.step import flat_step
from engine.scheduler import Batch
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
        self.model = model
        self.storage = storage
        self.table_of = table_of
        self.attention = attention
        self.device = device
        self._keeps_rows = accepts(model, "logits_to_keep")

    def apply(self, ops: Iterable[StorageOp]) -> None:
        """Resize storage as the accounting decided."""
        self.storage.apply(op for op in ops if not isinstance(op, CrossOp))

    def forward(self, batch: Batch, chosen_ids: ChosenIds | None = None) -> StepLogits:
        """Compute a batch; the blocks of its sequences gain its tokens' K and V.

        Returns:
            Logits [R, V] in the model's dtype.
        """
        inputs = build_paged_inputs(batch, self.table_of, self.device)
        if chosen_ids is not None:
            inputs = replace(inputs, input_ids=chosen_ids.inputs_for(inputs.items))
        return StepLogits(inputs.items, self.run(inputs))

    def run(self, inputs: PagedInputs) -> torch.Tensor:
        """The model over flat inputs; logits [R, V]."""
        kwargs: dict[str, Any] = {"logits_to_keep": inputs.logit_rows} if self._keeps_rows else {}
        with flat_step(PagedStep(inputs, self.storage, self.attention)):
            output = self.model(input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False, **kwargs)
        logits: torch.Tensor = output.logits[0]
        return logits if self._keeps_rows else logits[inputs.logit_rows]

    def forget(self, sequence: Sequence) -> None:
        """Nothing: what a sequence owns is its blocks, and the accounting takes those back."""

    def reset(self) -> None:
        """Drop all storage."""
        self.storage.clear()
