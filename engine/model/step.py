"""The step that is being computed: the one module state of the engine, set around a forward and restored after it.

Knows nothing of how attention is computed.
Set by the runners, read by model/attention.py and model/positions.py, which the model calls without handing it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.kv.slots import LayerShape, SlotStorage
from engine.model.cross_attention import CrossStep
from engine.model.inputs import FlatInputs
from engine.model.native_kernels import NativeKernels
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
        bias_copies: of them, for layers that compute on other devices.
        kernels: our own, where they are to attend to what they can: the step is their current one then.
    """

    inputs: FlatInputs
    storage: SlotStorage
    cross: CrossStep | None = None
    num_calls: int = 0
    windows: list[int | None] | None = None
    bias: torch.Tensor | None = None
    biases: dict[int, torch.Tensor] = field(default_factory=dict)
    bias_copies: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict)
    kernels: NativeKernels | None = None

    def bias_on(self, device: torch.device) -> torch.Tensor | None:
        """The relative bias for a layer that computes on `device`; copied once a step where that is another."""
        if self.bias is None or self.bias.device == device:
            return self.bias
        key = (id(self.bias), device)
        if key not in self.bias_copies:
            self.bias_copies[key] = self.bias.to(device)
        return self.bias_copies[key]


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


def step_positions(device: torch.device) -> torch.Tensor | None:
    """Int64 [1, T] on `device`, the positions of the step's tokens; None outside of a flat step."""
    return _current.inputs.on(device).position_ids if isinstance(_current, FlatStep) else None


def keep_logit_rows(_head: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Of a head's input, leave only the tokens whose logits are wanted: [1, T, D] -> [1, R, D].

    To be registered as a hook before a head's forward; does nothing outside of a step.
    """
    if not isinstance(_current, FlatStep | PagedStep):
        return None
    rows = _current.inputs.on(arguments[0].device).logit_rows
    if rows.shape[0] == arguments[0].shape[1]:
        return None
    return (arguments[0][:, rows], *arguments[1:])
