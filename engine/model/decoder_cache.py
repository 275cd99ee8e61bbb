"""The cache object that a flat decoder is given: it keeps nothing, and says that the encoder's K and V are there.

Knows nothing of slots or steps; our attention function finds both.
Made once by model/flat_decoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache


@dataclass(slots=True)
class _Layer:
    """What attention modules read of a cross-attention cache that is filled."""

    keys: torch.Tensor
    values: torch.Tensor
    is_initialized: bool = True


class _Passing(Cache):  # type: ignore[misc]  # transformers is not typed for us
    """A self-attention cache of length 0 that hands K and V through."""

    def __init__(self) -> None:
        self.layers: list[_Layer] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """K and V as they came: they go to slots in attention."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0, whatever was computed: positions are given, not counted."""
        return 0


class _Marked(Cache):  # type: ignore[misc]
    """A cross-attention cache whose K is the marker in every layer."""

    def __init__(self, num_layers: int, marker: torch.Tensor) -> None:
        self.layers = [_Layer(marker, marker) for _ in range(num_layers)]

    def __len__(self) -> int:
        """As many layers as the decoder has: some models ask whether the cache is empty."""
        return len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Something is there."""
        return 1


class StepCache(EncoderDecoderCache):  # type: ignore[misc]
    """What every step of a flat decoder is given as past_key_values.

    Args:
        num_layers: of the decoder.
        marker: [1, H, 1, D], handed to attention in the place of the encoder's K and V.
    """

    def __init__(self, num_layers: int, marker: torch.Tensor) -> None:
        self.self_attention_cache = _Passing()
        self.cross_attention_cache = _Marked(num_layers, marker)
        # True from the start: no module projects encoder states, and none writes here.
        self.is_updated = dict.fromkeys(range(num_layers), True)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given, not counted."""
        return 0
