"""An encoder-decoder's decoder made ready for flat steps, and the model put back as it was when that fails.

Knows nothing of slots, encoders or scheduling.
Made by model/seq2seq_check.py; model/seq2seq.py runs steps through it.

What differs from a causal LM: cross-attention, which our attention knows by a marker in the place of the encoder's K;
positions, which most decoders count themselves; and a head that is applied to all tokens unless its input is cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutput

from engine.kv.slots import LayerShape
from engine.model.attention import NAME, NotFlat, flat_attention
from engine.model.decoder_cache import StepCache
from engine.model.native_step import kernels_of, native_attention
from engine.model.positions import StepPositions
from engine.model.runner import accepts
from engine.model.step import Step, flat_step, keep_logit_rows


class FlatDecoder:
    """The decoder side of a model, driven flat.

    Args:
        model: an encoder-decoder with a language-modelling head; changed in place until undo().
        cross_shape: K of one encoder position in one layer.
        hidden_size: of the encoder's output.
        num_layers: of the decoder.
        num_positions: most positions of a decoder sequence.
        device: where inputs go.
    """

    def __init__(
        self,
        model: Any,
        *,
        cross_shape: LayerShape,
        hidden_size: int,
        num_layers: int,
        num_positions: int,
        device: torch.device,
    ) -> None:
        AttentionInterface.register(NAME, flat_attention)
        dtype = next(model.parameters()).dtype
        self.model = model
        marker_size = (1, cross_shape.num_kv_heads, 1, cross_shape.key_dim)
        self.marker = torch.zeros(marker_size, dtype=dtype, device=device)
        self.biases: dict[int, torch.Tensor] = {}
        hidden = torch.zeros((1, 1, hidden_size), dtype=dtype, device=device)
        self._encoder_output = BaseModelOutput(last_hidden_state=hidden)
        self._cache = StepCache(num_layers, self.marker)
        decoder = model.get_decoder()
        # Encoder and decoder may share one config object; only the decoder's attention becomes ours.
        self._configs = own_configs(decoder)
        if not self._configs:
            raise NotFlat("its decoder does not go through transformers' attention interface")
        self._plain_name = next(iter(self._configs.values()))._attn_implementation
        self._kernels = kernels_of(decoder)
        self._takes_positions = accepts(model, "decoder_position_ids")
        self._positions: str | None = None
        self._hook: Any = None
        self._use(NAME)
        try:
            if not self._takes_positions:
                self._positions = _own_positions(decoder, num_positions)
            head = model.get_output_embeddings()
            self._hook = None if head is None else head.register_forward_pre_hook(keep_logit_rows)
        except Exception:
            self.undo()
            raise

    def run(self, step: Step) -> torch.Tensor:
        """One flat step; logits [R, V] of the tokens that inputs.logit_rows names."""
        inputs = step.inputs
        more = {"decoder_position_ids": inputs.position_ids} if self._takes_positions else {}
        with flat_step(step), native_attention(self._kernels, step):
            output = self.model(
                decoder_input_ids=inputs.input_ids,
                encoder_outputs=self._encoder_output,
                past_key_values=self._cache,
                use_cache=True,
                **more,
            )
        logits: torch.Tensor = output.logits[0]
        # A model that does without an output embedding has not had its input cut.
        return logits if logits.shape[0] == inputs.logit_rows.shape[0] else logits[inputs.logit_rows]

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The model's own attention while the block runs."""
        self._use(self._plain_name)
        try:
            yield
        finally:
            self._use(NAME)

    def undo(self) -> None:
        """Put the model back as it was."""
        decoder = self.model.get_decoder()
        if self._hook is not None:
            self._hook.remove()
        if self._positions is not None:
            setattr(decoder, self._positions, getattr(decoder, self._positions).inner)
        self._use(self._plain_name)

    def _use(self, name: str) -> None:
        for config in self._configs.values():
            config._attn_implementation = name


def own_configs(side: torch.nn.Module) -> dict[int, Any]:
    """Give the modules of the encoder or the decoder copies of their configs; by the id of the original."""
    copies: dict[int, Any] = {}
    for module in side.modules():
        config = module.__dict__.get("config")
        if config is None:
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
        module.config = copies[id(config)]
    return copies


def _own_positions(decoder: torch.nn.Module, num_positions: int) -> str | None:
    """Put StepPositions in the place of the decoder's position embedding; its name, or None where there is none."""
    for name in ("embed_positions", "wpe"):
        module = getattr(decoder, name, None)
        if isinstance(module, torch.nn.Module):
            setattr(decoder, name, StepPositions(module, num_positions))
            return name
    return None
