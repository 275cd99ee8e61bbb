"""A forward over paged KV while it is computed: one layer after the other writes its K and V and attends.

Knows nothing of how attention is computed, nor of scheduling.
Made by model/paged_runner.py, set as the current step, asked by model/attention.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from engine.kv.paged import PagedStorage
from engine.model.paged_inputs import PagedInputs

if TYPE_CHECKING:
    from engine.model.attention import AttentionCall

OwnTokens = tuple[torch.Tensor, torch.Tensor]  # K and V of a step's tokens: [Hkv, T, Dk], [Hkv, T, Dv]


class PagedAttention(Protocol):
    """What computes a layer's attention: the kernel, or its twin."""

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: PagedInputs,
        call: AttentionCall,
        own: OwnTokens | None = None,
    ) -> torch.Tensor:
        """From query [T, H, Dk], a layer's keys and values [N, BLOCK_SIZE, Hkv, D] and the step to [T, H, Dv].

        `own`, where it is given, is what the step's tokens have written to the blocks.
        """


@dataclass(slots=True)
class PagedStep:
    """One forward.

    Args:
        inputs: the flat batch.
        storage: where K and V go.
        attention: the kernel, or its twin.
        num_calls: attention calls so far.
    """

    inputs: PagedInputs
    storage: PagedStorage
    attention: PagedAttention
    num_calls: int = 0

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """The next layer: [1, H, T, Dk], [1, Hkv, T, Dk], [1, Hkv, T, Dv] -> [1, T, H, Dv]; writes its K and V."""
        layer = self.num_calls
        self.num_calls += 1
        return self.attend_in(layer, query, key, value, call)

    def attend_in(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
    ) -> torch.Tensor:
        """As attend, in a layer that is named."""
        keys, values = self.storage.keys[layer], self.storage.values[layer]
        inputs = self.inputs.on(query.device)
        write(keys, key[0].transpose(0, 1), inputs.slot_mapping)
        write(values, value[0].transpose(0, 1), inputs.slot_mapping)
        # Triton starts a kernel on the current device, wherever its tensors are.
        is_elsewhere = inputs is not self.inputs and torch.cuda.is_available()
        with torch.cuda.device(query.device) if is_elsewhere else nullcontext():
            return self.attention(query[0].transpose(0, 1), keys, values, inputs, call, (key[0], value[0]))[None]


def write(cached: torch.Tensor, new: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Put the K or V of [T, H, D] where slot_mapping [T] says, in [N, BLOCK_SIZE, H, D]."""
    cached.view(-1, *cached.shape[2:]).index_copy_(0, slot_mapping, new)
