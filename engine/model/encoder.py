"""Runs a model's encoder and gives the decoder's K and V of its output, several sources at once.

Knows nothing of slots or scheduling; what it makes is written to slots by model/seq2seq.py.
Called by model/seq2seq.py and model/seq2seq_check.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from engine.sequence import Source

LayerKV = tuple[torch.Tensor, torch.Tensor]  # [B, Hkv, L, Dk], [B, Hkv, L, Dv]


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """A batch of sources.

    Args:
        values: token ids int64 [B, L], or spectrograms [B, F, T] of the model's dtype.
        mask: int64 [B, L], 0 where there is padding; None for spectrograms, which have none.
    """

    values: torch.Tensor
    mask: torch.Tensor | None


class EncoderProgram(Protocol):
    """What computes an encoder's output: the model itself, or compiled code in its place."""

    def run(self, inputs: EncoderInputs, /) -> torch.Tensor:
        """The output [B, L, D]."""


class PlainEncoder:
    """The model's own encoder.

    Args:
        model: the encoder alone.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, inputs: EncoderInputs, /) -> torch.Tensor:
        """As EncoderProgram.run."""
        if inputs.mask is None:
            output = self.model(inputs.values)
        else:
            output = self.model(input_ids=inputs.values, attention_mask=inputs.mask)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


class Encoder:
    """The encoder of one model, and the projections of its output.

    Args:
        model: the whole model.
        device: where inputs go.
        plain: makes the model's own attention stand while a block runs.
    """

    def __init__(self, model: Any, device: torch.device, plain: Callable[[], AbstractContextManager[None]]) -> None:
        self._model = model
        self.program: EncoderProgram = PlainEncoder(model.get_encoder())
        self._device = device
        self._plain = plain
        self._pad_id = int(getattr(model.config, "pad_token_id", None) or 0)
        start = getattr(model.config, "decoder_start_token_id", None)
        self._any_id = self._pad_id if start is None else int(start)

    def encode(self, sources: Sequence[Source]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the encoder over texts, padded on the right, or over spectrograms.

        Returns:
            Its output [B, L, D], and the mask of the padding int64 [B, L], None where nothing is padded.
        """
        if sources[0].token_ids is None:
            features = torch.stack([torch.from_numpy(source.features) for source in sources])
            return self.program.run(EncoderInputs(features.to(self._device, self._model.dtype), None)), None
        length = max(source.num_positions for source in sources)
        ids = torch.full((len(sources), length), self._pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, source in enumerate(sources):
            assert source.token_ids is not None  # texts and speech never meet in one model
            ids[row, : source.num_positions] = torch.tensor(source.token_ids)
            mask[row, : source.num_positions] = 1
        mask = mask.to(self._device)
        hidden = self.program.run(EncoderInputs(ids.to(self._device), mask))
        return hidden, None if bool(mask.all()) else mask

    def project(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> list[LayerKV]:
        """The decoder's K and V of the encoder's output, layer by layer, as the model itself makes them.

        One decoder token is run for each source: what its cross-attention leaves in the model's own cache is the
        answer, however the model gets there.
        """
        layers = self.run_plain(hidden, mask, num_tokens=1).cross_attention_cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def run_plain(self, hidden: torch.Tensor, mask: torch.Tensor | None, *, num_tokens: int) -> Any:
        """Run a few decoder tokens with the model's own attention; returns the EncoderDecoderCache they leave."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = torch.full((hidden.shape[0], num_tokens), self._any_id, dtype=torch.int64, device=self._device)
        with self._plain():
            self._model(
                decoder_input_ids=ids,
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        return cache
