"""What a static KV cache takes: a table for the log, and a refusal with the arithmetic where it does not fit.

Knows nothing of tensors, slots or pages; no torch here.
Called by engine/build.py and engine/build_paged.py before they allocate.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Series
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Store:
    """One kind of KV memory: bytes a position, and the most positions of a sequence."""

    name: str
    bytes_per_position: int
    longest: int

    @property
    def bytes_per_sequence(self) -> int:
        """Of the longest sequence."""
        return self.bytes_per_position * self.longest


def announce_static(stores: Series[Store], num_slots: int, budget_bytes: int | None) -> None:
    """Log what one slot of the full length for each of `num_slots` sequences takes.

    Raises:
        ValueError: it is more than the budget.
    """
    rows = [
        f"{store.name}: {store.bytes_per_position} bytes a token x {store.longest} positions = "
        f"{store.bytes_per_sequence} bytes a slot x {num_slots} slots = {store.bytes_per_sequence * num_slots} bytes"
        for store in stores
    ]
    total = sum(store.bytes_per_sequence for store in stores) * num_slots
    if budget_bytes is not None and total > budget_bytes:
        raise ValueError(f"--static-cache True: {'; '.join(rows)}; {budget_bytes} bytes are free for it")
    for row in rows:
        logger.info("static KV cache, %s", row)
