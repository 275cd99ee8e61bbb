"""Tells how likely some tokens are after a token of a prompt.

Knows nothing of rules, temperature or scheduling: the probabilities are the model's own.
Called by engine/prompt_reader.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from engine.transfer import upload


def probabilities(logits: Tensor, rows: Rows[int], token_ids: Rows[Rows[int]]) -> list[tuple[float, ...] | None]:
    """Return the softmax of some rows of raw logits at some tokens.

    Args:
        logits: [R, V] any float dtype; not changed.
        rows: S indices into R.
        token_ids: for each of the S rows, the tokens asked for.

    Returns:
        S entries, each with a probability (softmax in float32) a token; None for a row whose logits hold a NaN, an
        infinity or nothing finite.
    """
    if not rows:
        return []
    # Row by row, so that no more than one is held in float32; one transfer for all that was asked.
    index = [upload(ids, torch.int64, logits.device) for ids in token_ids]
    asked = [logits[row].float().softmax(-1)[ids] for row, ids in zip(rows, index, strict=True)]
    values = iter(torch.cat(asked).tolist())
    told = [tuple(next(values) for _ in ids) for ids in token_ids]
    return [None if any(map(math.isnan, row)) else row for row in told]
