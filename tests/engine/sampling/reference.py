"""The slow plain twin of the sampler: one row at a time, Python floats, a sort of the whole vocabulary.

Knows nothing of tensors' layout, batching or candidates.
Used by the tests of engine/sampling/.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling.draw import uniform
from engine.sequence import SamplingParams, Sequence


@dataclass(frozen=True, slots=True)
class Reference:
    """The token the plain twin chose, what it chose from, and how near the uniform was to choosing another."""

    token_id: int
    probabilities: dict[int, float]
    margin: float


def processed(logits: Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> list[float]:
    """Apply bias, penalties and min_tokens to one row [V], in float32 as the sampler does."""
    params = sequence.params
    row: list[float] = logits.float().tolist()
    output = sequence.output_token_ids

    def rounded(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float32))

    for token_id, bias in params.logit_bias:
        row[token_id] = rounded(row[token_id] + bias)
    if params.repetition_penalty != 1.0:
        penalty = rounded(params.repetition_penalty)
        for token_id in set(sequence.prompt_token_ids) | set(output):
            row[token_id] = rounded(row[token_id] * penalty if row[token_id] < 0 else row[token_id] / penalty)
    for token_id, count in Counter(output).items():
        row[token_id] = rounded(row[token_id] - count * params.frequency_penalty - params.presence_penalty)
    if len(output) < params.min_tokens:
        for token_id in params.stop_token_ids | (frozenset() if params.ignore_eos else eos_token_ids):
            row[token_id] = -math.inf
    return row


def filtered(row: list[float], params: SamplingParams) -> dict[int, float]:
    """Return the probabilities, by token id, of what temperature, top_k, top_p and min_p leave of one row."""
    largest = max(row)
    weights = {i: math.exp((x - largest) / params.temperature) for i, x in enumerate(row)}
    ranked = sorted(weights, key=lambda i: (-row[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    mass = math.fsum(weights[i] for i in ranked)
    kept = []
    before = 0.0
    for i in ranked:
        if (params.top_p >= 1.0 or before < params.top_p * mass) and weights[i] >= params.min_p:
            kept.append(i)
        before += weights[i]
    mass = math.fsum(weights[i] for i in kept)
    return {i: weights[i] / mass for i in sorted(kept)}


def sample(logits: Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> Reference:
    """Choose the next token of one row [V]."""
    row = processed(logits, sequence, eos_token_ids)
    params = sequence.params
    if params.temperature == 0.0 or params.top_k == 1:
        best = max(range(len(row)), key=lambda i: (row[i], -i))
        return Reference(best, {best: 1.0}, 1.0)
    probabilities = filtered(row, params)
    target = uniform(params.seed, len(sequence.output_token_ids))
    reached = 0.0
    chosen = -1
    margin = 1.0
    for token_id, probability in probabilities.items():
        reached += probability
        margin = min(margin, abs(reached - target))
        if chosen < 0 and reached > target:
            chosen = token_id
    return Reference(chosen, probabilities, margin)
