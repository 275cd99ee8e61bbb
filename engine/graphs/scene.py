"""What captured steps work on, as far as capturing needs to know it.

Knows nothing of capturing; graphs/paged_scene.py and graphs/slot_scene.py are the two there are.
Asked by graphs/steps.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from engine.model.paged_inputs import Ids
from engine.model.step import Step


class Layout(Protocol):
    """A decode step as the host knows it."""

    @property
    def input_ids(self) -> Ids:
        """Int64 [B], a token of each sequence."""

    @property
    def logit_rows(self) -> Ids:
        """Int64 [R], the tokens whose logits are wanted."""


L = TypeVar("L", bound=Layout)


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[L]):
    """The inputs of steps of one size: tensors that stay where they are.

    Args:
        fill: puts a step of at most as many sequences in; tokens int64 [B] or [1, B] on the device, where given, stand
            in the place of its own.
        step: a step that reads them; a new one for each run, since a step counts its layers.
    """

    fill: Callable[[L, torch.Tensor | None], None]
    step: Callable[[], Step]


class Scene(Protocol[L]):
    """Storage that never moves, with room for rows that belong to nobody."""

    def inputs(self, size: int) -> StepInputs[L]:
        """New inputs of steps of up to `size` sequences."""

    def trial(self, num_rows: int) -> AbstractContextManager[L]:
        """A step of that many rows that harms no sequence, as long as the block lasts."""

    def eager(self, layout: L) -> Step:
        """A trial's step as the program runs it."""
