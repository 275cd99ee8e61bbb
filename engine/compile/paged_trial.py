"""Decode steps over pages that belong to nobody: what compiled and captured steps are tried on before they serve.

Knows nothing of compilers or graphs.
Made by engine/build_paged.py for compile/steps.py; graphs/paged_scene.py lays the same steps out over spare blocks.

The rows are tokens of one text, all at once: a row writes its key to its own position and reads those of the rows
before it. Rows more than there are positions repeat others to the letter, so that it does not matter who writes last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.kv.paged import PagedStorage
from engine.kv.prefix import BLOCK_SIZE
from engine.kv.slots import LayerShape
from engine.model.paged_inputs import PagedLayout
from engine.model.paged_step import PagedStep

if TYPE_CHECKING:
    from engine.model.paged_step import PagedAttention

NUM_TRIAL_BLOCKS = 2  # the text is longer than one


def trial_layout(num_rows: int, *, first_block: int, max_model_len: int, vocab_size: int) -> PagedLayout:
    """A decode step of that many rows in NUM_TRIAL_BLOCKS blocks from `first_block` on.

    Position 0 holds token 0, as rows that only fill a captured step do.
    """
    span = min(NUM_TRIAL_BLOCKS * BLOCK_SIZE, max_model_len)
    positions = (7 * np.arange(num_rows) + 3) % span
    blocks = np.arange(first_block, first_block + NUM_TRIAL_BLOCKS)
    lengths = tuple(int(position) + 1 for position in positions)
    return PagedLayout(
        items=(),
        input_ids=11 * positions % vocab_size,
        position_ids=positions,
        logit_rows=np.arange(num_rows),
        slot_mapping=first_block * BLOCK_SIZE + positions,
        query_lens=(1,) * num_rows,
        lengths=lengths,
        tables=tuple(blocks[: -(-length // BLOCK_SIZE)] for length in lengths),
    )


@dataclass(frozen=True, slots=True)
class PagedTrialSetting:
    """What a model's steps over pages are made of.

    Args:
        shapes: K and V of each layer.
        vocab_size: token ids are below it.
        max_model_len: positions are below it.
        device: where inputs go.
        attention: the kernel or its twin.
    """

    shapes: tuple[LayerShape, ...]
    vocab_size: int
    max_model_len: int
    device: torch.device
    attention: PagedAttention

    def steps(self, num_rows: int) -> Callable[[], PagedStep]:
        """Makes one and the same step of that many rows, as often as it is called."""
        storage = PagedStorage(self.shapes, self.device, NUM_TRIAL_BLOCKS)
        generator = torch.Generator(self.device).manual_seed(0)
        for tensor in (*storage.keys, *storage.values):
            tensor.normal_(generator=generator)
        layout = trial_layout(
            num_rows, first_block=0, max_model_len=self.max_model_len, vocab_size=self.vocab_size
        )  # fmt: skip
        return lambda: PagedStep(layout.to(self.device), storage, self.attention)
