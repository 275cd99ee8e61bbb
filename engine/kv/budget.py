"""How much KV there may be in all when layers keep theirs on several devices, each with a bound of its own.

Knows nothing of tensors or models: bytes of a position by device come in, one number goes out.
Called by engine/build.py for a model that is spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreUse:
    """What one kind of KV memory takes.

    Args:
        bytes_by_device: of a position, on each device.
        longest: positions of a sequence; stores share a budget in proportion to what their longest sequences take.
    """

    bytes_by_device: Mapping[str, int]
    longest: int


def budget_within(asked: int | None, limits: Mapping[str, int], uses: Sequence[StoreUse]) -> int:
    """Most bytes of KV in all at which no device holds more than it may.

    Args:
        asked: bytes that the operator wants; None for as many as there may be.
        limits: bytes that each device may hold.
        uses: of each store.

    Raises:
        ValueError: more is asked for than a device may hold of it.
    """
    total = sum(sum(use.bytes_by_device.values()) * use.longest for use in uses)
    found: int | None = None
    for device, limit in limits.items():
        share = sum(use.bytes_by_device.get(device, 0) * use.longest for use in uses)
        if not share:
            continue
        if asked is not None and asked * share // total > limit:
            raise ValueError(
                f"--kv-cache-memory {asked}: {asked * share // total} bytes of it would be on {device}, "
                f"where {limit} are free"
            )
        most = limit * total // share
        found = most if found is None else min(found, most)
    if asked is not None:
        return asked
    return sum(limits.values()) if found is None else found
