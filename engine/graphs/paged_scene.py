"""Captured steps of decoders: K and V in pages.

Knows nothing of capturing or of models.
Made by engine/build_paged.py for graphs/steps.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.compile.paged_trial import trial_layout
from engine.graphs.scene import StepInputs
from engine.graphs.static_inputs import StaticInputs
from engine.kv.paged import PagedStorage
from engine.kv.paged_manager import num_blocks_for
from engine.model.paged_inputs import PagedLayout
from engine.model.paged_step import PagedStep

if TYPE_CHECKING:
    from engine.model.paged_step import PagedAttention


@dataclass(frozen=True, slots=True)
class PagedScene:
    """As Scene.

    Args:
        storage: blocks that never move.
        attention: the kernel, or its twin.
        spare_block: the first of NUM_TRIAL_BLOCKS blocks that no sequence is ever given.
        max_model_len: tokens of the longest sequence.
        vocab_size: token ids are below it.
        device: where all this is.
    """

    storage: PagedStorage
    attention: PagedAttention
    spare_block: int
    max_model_len: int
    vocab_size: int
    device: torch.device

    def inputs(self, size: int) -> StepInputs[PagedLayout]:
        """As Scene.inputs."""
        static = StaticInputs(size, num_blocks_for(self.max_model_len), self.spare_block, self.device)
        return StepInputs(static.fill, lambda: PagedStep(static.inputs, self.storage, self.attention))

    @contextmanager
    def trial(self, num_rows: int) -> Iterator[PagedLayout]:
        """As Scene.trial: in the spare blocks."""
        yield trial_layout(
            num_rows, first_block=self.spare_block, max_model_len=self.max_model_len, vocab_size=self.vocab_size
        )

    def eager(self, layout: PagedLayout) -> PagedStep:
        """As Scene.eager."""
        return PagedStep(layout.to(self.device), self.storage, self.attention)
