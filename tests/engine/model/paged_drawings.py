"""A step over paged KV drawn at random: blocks scattered over the storage, queries, keys and values.

Knows nothing of what attention makes of it.
Called by the tests of paged attention, here and in tests/gpu.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch

from engine.batch import Batch, ScheduledSequence
from engine.kv.prefix import BLOCK_SIZE
from engine.model.paged_inputs import PagedInputs, build_paged_inputs
from engine.sequence import SamplingParams, Sequence


@dataclass(frozen=True, slots=True)
class Drawing:
    """Arguments of paged attention."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    inputs: PagedInputs
    sinks: torch.Tensor


def draw(
    runs: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Drawing:
    """A step of `runs`, (start, tokens) each; what no run has written is NaN.

    `heads` are query heads and KV heads, `dims` those of keys and values.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-(start + count) // BLOCK_SIZE) for start, count in runs]
    order = torch.randperm(sum(num_blocks) + 3, generator=generator).tolist()
    tables, taken = [], 0
    for count in num_blocks:
        tables.append(array("q", order[taken : taken + count]))
        taken += count
    sequences = [
        Sequence(n, [1] * (start + count), SamplingParams(max_tokens=1), 0.0) for n, (start, count) in enumerate(runs)
    ]
    batch = Batch(
        tuple(ScheduledSequence(s, start, count, 1) for s, (start, count) in zip(sequences, runs, strict=True))
    )
    inputs = build_paged_inputs(batch, lambda s: tables[s.sequence_id], torch.device(device))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    caches = []
    for dim in dims:
        cache = torch.full((len(order), BLOCK_SIZE, heads[1], dim), torch.nan)
        for (start, count), table in zip(runs, tables, strict=True):
            for position in range(start + count):
                cache[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = normal(heads[1], dim)
        caches.append(cache.to(device, dtype))
    query = normal(sum(count for _, count in runs), heads[0], dims[0]).to(device, dtype)
    return Drawing(query, caches[0], caches[1], inputs, normal(heads[0]).to(device, dtype))
