"""The step that is being computed: the one module state of the engine, set around a forward and restored after it.

Knows nothing of how attention is computed.
Set by the runners, read by model/attention.py and model/positions.py, which the model calls without handing it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from engine.kv.slots import LayerShape, SlotStorage
from engine.model.cross_attention import CrossStep
from engine.model.inputs import FlatInputs
from engine.model.paged_step import PagedStep


@dataclass(slots=True)
class FlatStep:
    """One forward; one layer after the other asks for attention.

    Args:
        inputs: the flat batch.
        storage: where K and V go.
        cross: of an encoder-decoder, where its tokens' sources are.
        num_calls: attention calls so far, cross-attention aside.
        windows: if given, is filled with the sliding window of each call.
        bias: the relative bias by distance [H, N] of the layer that has one; later layers share it.
        biases: by module, made once and kept by the runner.
    """

    inputs: FlatInputs
    storage: SlotStorage
    cross: CrossStep | None = None
    num_calls: int = 0
    windows: list[int | None] | None = None
    bias: torch.Tensor | None = None
    biases: dict[int, torch.Tensor] = field(default_factory=dict)


Step = FlatStep | PagedStep  # a forward whose K and V are kept, in slots or in pages


@dataclass(slots=True)
class Recording:
    """What a probing forward saw: one entry an attention call."""

    shapes: list[LayerShape] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)


_current: FlatStep | PagedStep | Recording | None = None


@contextmanager
def flat_step(step: FlatStep | PagedStep | Recording) -> Iterator[None]:
    """Make `step` the one that attention calls refer to; some families drop keyword arguments on the way there."""
    global _current  # noqa: PLW0603  the one module state of the engine, set and restored here alone
    previous, _current = _current, step
    try:
        yield
    finally:
        _current = previous


def current_step() -> FlatStep | PagedStep | Recording | None:
    """The step that is being computed, None outside of one."""
    return _current


def step_positions() -> torch.Tensor | None:
    """Int64 [1, T], the positions of the step's tokens; None outside of a flat step."""
    return _current.inputs.position_ids if isinstance(_current, FlatStep) else None


def step_logit_rows() -> torch.Tensor | None:
    """Int64 [R], the tokens of the step whose logits are wanted; None outside of a flat step."""
    return _current.inputs.logit_rows if isinstance(_current, FlatStep) else None
