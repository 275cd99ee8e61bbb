"""The tokens of a step that the device has chosen and the host has not read: input of the step after it.

Knows nothing of how they were chosen.
Made by engine/flight.py, put into a step's inputs by the runners.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from engine.batch import ScheduledSequence
from engine.transfer import upload


@dataclass(frozen=True, slots=True)
class ChosenIds:
    """One token for each of some sequences.

    Args:
        token_ids: int64 [R], on the device.
        row_of: where each sequence's is, by sequence id.
    """

    token_ids: torch.Tensor
    row_of: Mapping[int, int]

    def inputs_for(self, items: Iterable[ScheduledSequence]) -> torch.Tensor:
        """The input of a flat step whose items are these sequences' next single tokens: int64 [1, T]."""
        rows = [self.row_of[item.sequence.sequence_id] for item in items]
        if rows == list(range(self.token_ids.shape[0])):
            return self.token_ids[None]
        return self.token_ids.index_select(0, upload(rows, torch.int64, self.token_ids.device))[None]
