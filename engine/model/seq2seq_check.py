"""Which lane an encoder-decoder takes, found by trying: flat only when it gives the plain forward's logits.

Knows nothing of requests, sampling or memory budgets; the twin of model/selfcheck.py, which does it for causal LMs.
Called once by engine.py when it is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutput

from engine.batch import Batch, ScheduledSequence
from engine.kv.pool import ResizeArena, Slot
from engine.kv.slots import LayerShape, SlotStorage
from engine.model import encoder_attention
from engine.model.attention import NotFlat
from engine.model.cross_attention import build_cross
from engine.model.encoder import Encoder
from engine.model.flat_decoder import FlatDecoder, own_configs
from engine.model.inputs import build_inputs
from engine.model.selfcheck import (
    TRIAL_FAILURES,
    check_windows,
    judge,
    row_errors,
    trial_prompts,
    trial_steps,
    why_not_flat,
)
from engine.model.step import FlatStep
from engine.sequence import SamplingParams, Sequence, Source

_SOURCE_LENGTHS = (19, 12)  # one longer than the other: padding, and a slot that is not full
_CAPACITY = 32


@dataclass(frozen=True, slots=True)
class Seq2SeqParts:
    """An encoder-decoder ready for flat steps.

    Args:
        decoder, encoder: its two sides.
        shapes, cross_shapes: K and V of each decoder layer, its own and the encoder's.
        reason: one sentence for the log and /health.
    """

    decoder: FlatDecoder
    encoder: Encoder
    shapes: tuple[LayerShape, ...]
    cross_shapes: tuple[LayerShape, ...]
    reason: str


def try_flat(model: Any, device: torch.device, *, num_positions: int, is_speech: bool) -> Seq2SeqParts | str:
    """Try the flat form and leave the model set up for the lane it takes: its parts, or why it is not flat.

    Args:
        model: an encoder-decoder with a head, on its device, in eval mode.
        device: where inputs go.
        num_positions: most positions of a decoder sequence.
        is_speech: whether sources are spectrograms.
    """
    reason = why_not_flat(model.config)
    if reason is not None:
        return reason
    decoder: FlatDecoder | None = None
    try:
        prompts = trial_prompts(model)
        hiddens = _hiddens(model, device, is_speech)
        expected = [_plain_logits(model, ids, hidden, device) for ids, hidden in zip(prompts, hiddens, strict=True)]
        shapes, cross_shapes = _shapes(model, hiddens[0], device)
        decoder = FlatDecoder(
            model,
            cross_shape=cross_shapes[0],
            hidden_size=hiddens[0].shape[-1],
            num_layers=len(shapes),
            num_positions=max(num_positions, _CAPACITY),  # the trial needs some however short sequences will be
            device=device,
        )
        encoder = Encoder(model, device, decoder.plain)
        error = _Trial(decoder, encoder, shapes, cross_shapes, device).compare(prompts, hiddens, expected)
        if is_speech and encoder_attention.is_faster(model, device):
            AttentionInterface.register(encoder_attention.NAME, encoder_attention.encoder_attention)
            for config in own_configs(model.get_encoder()).values():
                config._attn_implementation = encoder_attention.NAME
    except NotFlat as refusal:
        reason = str(refusal)
    except TRIAL_FAILURES as failure:
        reason = f"the flat trial raised {type(failure).__name__}: {str(failure).split(chr(10))[0][:200]}"
    else:
        return Seq2SeqParts(decoder, encoder, shapes, cross_shapes, f"agrees with the plain forward within {error:.1e}")
    if decoder is not None:
        decoder.undo()
    return reason


def _hiddens(model: Any, device: torch.device, is_speech: bool) -> list[torch.Tensor]:
    """Two encoder outputs [1, L, D]. Of random texts; speech needs none: its encoder has no padding to get wrong."""
    generator = torch.Generator().manual_seed(1)
    if is_speech:
        size = model.config.d_model
        noise = [torch.randn((1, length, size), generator=generator) for length in _SOURCE_LENGTHS]
        return [hidden.to(device, model.dtype) for hidden in noise]
    vocab_size = model.get_input_embeddings().weight.shape[0]
    low = min(4, vocab_size - 1)
    sources = []
    for number, length in enumerate(_SOURCE_LENGTHS):
        ids = torch.randint(low, vocab_size, (length,), generator=generator).tolist()
        sources.append(Source(bytes([number]), length, tuple(ids)))
    encoder = Encoder(model, device, torch.no_grad)
    alone = [encoder.encode([source])[0] for source in sources]
    together, _ = encoder.encode(sources)
    errors = [
        error for row, hidden in enumerate(alone) for error in row_errors(together[row, : hidden.shape[1]], hidden[0])
    ]
    judge(errors, model.dtype)
    return alone


def _plain_logits(model: Any, token_ids: list[int], hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
    output = model(
        decoder_input_ids=torch.tensor([token_ids], device=device),
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        use_cache=False,
    )
    logits: torch.Tensor = output.logits[0]
    return logits


def _shapes(
    model: Any, hidden: torch.Tensor, device: torch.device
) -> tuple[tuple[LayerShape, ...], tuple[LayerShape, ...]]:
    cache = Encoder(model, device, torch.no_grad).run_plain(hidden, None, num_tokens=2)
    own, cross = (
        tuple(
            LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
            for keys, values in ((layer.keys, layer.values) for layer in layers)
        )
        for layers in (cache.self_attention_cache.layers, cache.cross_attention_cache.layers)
    )
    if not own or len(own) != len(cross):
        raise NotFlat(f"{len(own)} layers of self-attention keep K and V, and {len(cross)} of cross-attention")
    return own, cross


class _Trial:
    """Both prompts interleaved over several steps, in slots, against plain forwards."""

    def __init__(
        self,
        decoder: FlatDecoder,
        encoder: Encoder,
        shapes: tuple[LayerShape, ...],
        cross_shapes: tuple[LayerShape, ...],
        device: torch.device,
    ) -> None:
        self._decoder, self._encoder, self._device = decoder, encoder, device
        self._storage, self._cross_storage = SlotStorage(shapes, device), SlotStorage(cross_shapes, device)
        # Not slots 0 and 1 in order: a row that reads another's slot must show.
        self._slots = {0: Slot(_CAPACITY, 2), 1: Slot(_CAPACITY, 0)}
        self._cross_slots = {0: Slot(_CAPACITY, 1), 1: Slot(_CAPACITY, 2)}

    def compare(self, prompts: list[list[int]], hiddens: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
        """The largest relative error; raises NotFlat when it is more than rounding."""
        self._storage.apply([ResizeArena(_CAPACITY, (), 3)])
        self._cross_storage.apply([ResizeArena(_CAPACITY, (), 3)])
        sequences = []
        for number, (prompt, hidden) in enumerate(zip(prompts, hiddens, strict=True)):
            for layer, (keys, values) in enumerate(self._encoder.project(hidden, None)):
                self._cross_storage.write(self._cross_slots[number], layer, keys[0], values[0])
            source = Source(bytes([number]), hidden.shape[1])
            sequences.append(Sequence(number, prompt, SamplingParams(max_tokens=1), arrival_time_s=0.0, source=source))
        errors: list[float] = []
        windows: list[int | None] = []
        for taken in trial_steps(len(prompts[0]), len(prompts[1])):
            batch = Batch(tuple(ScheduledSequence(sequences[n], start, count, count) for n, start, count in taken))
            inputs = build_inputs(batch, lambda s: self._slots[s.sequence_id], self._storage, self._device)
            marker = self._decoder.marker
            cross = build_cross(inputs, lambda s: self._cross_slots[s.sequence_id], self._cross_storage, marker, {})
            windows.clear()
            step = FlatStep(inputs, self._storage, cross, windows=windows, biases=self._decoder.biases)
            logits = self._decoder.run(step)
            num_layers = len(self._storage.shapes)
            if (step.num_calls, cross.num_calls) != (num_layers, num_layers):
                raise NotFlat(f"{step.num_calls} and {cross.num_calls} attention calls for {num_layers} layers")
            wanted = [expected[i.sequence.sequence_id][i.start : i.start + i.num_tokens] for i in inputs.items]
            errors += row_errors(logits, torch.cat(wanted))
        check_windows(self._decoder.model.config.get_text_config(decoder=True), windows)
        return judge(errors, self._storage.shapes[0].dtype)
