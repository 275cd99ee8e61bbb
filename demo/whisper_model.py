"""The demo speech model while it learns: Whisper's own layers, called on parts of windows, and what else is learnt.

Knows nothing of sound or of optimizers. The additions are gone once `finished` has written them into Whisper's tables.
Called by train_whisper.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, WhisperConfig, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import sinusoids

from demo.speech.windows import NUM_POSITIONS
from demo.whisper_examples import NUM_CLASSES, Batch
from demo.whisper_tokenizer import MAX_POSITIONS, TIMESTAMPS

if TYPE_CHECKING:
    from transformers import WhisperTokenizer

_WIDTH = 128
# (layer, head) of the decoder whose cross-attention is taught where each token is heard.
_GUIDED_HEADS = ((1, 0), (2, 0), (2, 1))
# The heads that word times come from. Once the guided ones find a word, those beside them look more evenly at it:
# measured with training's voices, words begin 0.08 s off by these and 0.2 s, nearly always early, by the guided ones.
ALIGNMENT_HEADS = ((2, 2), (2, 3))
# The encoder's scores of so many positions at once stay in the cache: twice as fast as torch's own attention on a CPU.
_QUERY_CHUNK = 128
_ATTENTION = "seen_attention"


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean cross-entropy of the tokens, of the frame classes, and how far the guided heads look past the words."""

    tokens: Tensor
    classes: Tensor
    guide: Tensor

    def total(self) -> Tensor:
        """What is minimised."""
        return self.tokens + 0.4 * self.classes + 0.3 * self.guide


def build_whisper(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """The untrained model: Whisper's shape, very small."""
    end = tokenizer.eos_token_id
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer), num_mel_bins=80, d_model=_WIDTH, encoder_layers=3, decoder_layers=3,
            encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=4 * _WIDTH, decoder_ffn_dim=4 * _WIDTH,
            max_source_positions=NUM_POSITIONS, max_target_positions=MAX_POSITIONS,
            bos_token_id=end, eos_token_id=end, pad_token_id=end,
            decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


class Learner(nn.Module):
    """Whisper, a classifier of its encoder's positions, and the maps that make the tables of positions and timestamps.

    Timestamps and decoder positions are linear maps of the sinusoids that the encoder's positions are, for none of the
    1,501 timestamps is heard often enough to be learnt alone.
    """

    def __init__(self, whisper: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.whisper = whisper
        self.frame_head = nn.Linear(_WIDTH, NUM_CLASSES)
        self.stamp_map = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.position_map = nn.Linear(_WIDTH, _WIDTH, bias=False)
        nn.init.normal_(self.stamp_map.weight, std=0.02 / (_WIDTH / 2) ** 0.5)
        nn.init.normal_(self.position_map.weight, std=0.02 / (_WIDTH / 2) ** 0.5)
        self.register_buffer("stamp_waves", sinusoids(NUM_POSITIONS + 1, _WIDTH))
        self.register_buffer("position_waves", sinusoids(MAX_POSITIONS, _WIDTH))
        # Only timestamps' and positions' maps are learnt; `finished` writes the tables out.
        whisper.model.decoder.embed_positions.requires_grad_(False)
        AttentionInterface.register(_ATTENTION, _attend)
        whisper.set_attn_implementation(_ATTENTION)

    def losses(self, batch: Batch) -> Losses:
        """All that is to be learnt from a batch."""
        heard = self.hear(batch.features, batch.first)  # [B, S, D]
        seen, hidden = self._say(batch.ids, heard)
        learnt = (batch.targets >= 0).flatten().nonzero().flatten()
        logits = functional.linear(hidden.flatten(0, 1)[learnt], self.token_table())  # [N, V]
        return Losses(
            functional.cross_entropy(logits.float(), batch.targets.flatten()[learnt]),
            functional.cross_entropy(self.frame_head(heard).flatten(0, 1).float(), batch.classes.flatten()),
            _guide(seen, batch),
        )

    def hear(self, features: Tensor, first: Tensor) -> Tensor:
        """The encoder on parts of windows: `[B, 80, 2 S]` and where each begins `[B]` -> `[B, S, D]`."""
        encoder = self.whisper.model.encoder
        hidden = functional.gelu(encoder.conv1(features))
        hidden = functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
        positions = first[:, None] + torch.arange(hidden.shape[1])  # [B, S]
        hidden = hidden + encoder.embed_positions(positions)
        for layer in encoder.layers:
            hidden = layer(hidden, None)
        normed: Tensor = encoder.layer_norm(hidden)
        return normed

    def _say(self, ids: Tensor, heard: Tensor) -> tuple[list[Tensor], Tensor]:
        """The decoder: the guided heads' cross-attention, each `[B, T, S]`, and the last hidden states `[B, T, D]`."""
        decoder = self.whisper.model.decoder
        hidden = functional.embedding(ids, self.token_table()) + self.position_table()[: ids.shape[1]]
        for layer in decoder.layers:
            hidden = layer(hidden, encoder_hidden_states=heard, use_cache=False)
        seen = [decoder.layers[layer].encoder_attn.seen[:, head] for layer, head in _GUIDED_HEADS]
        return seen, decoder.layer_norm(hidden)

    def token_table(self) -> Tensor:
        """Embeddings of all tokens, `[V, D]`."""
        learnt = self.whisper.model.decoder.embed_tokens.weight[: -len(TIMESTAMPS)]
        return torch.cat((learnt, self.stamp_map(self.stamp_waves)))

    def position_table(self) -> Tensor:
        """Embeddings of the decoder's positions, `[448, D]`."""
        table: Tensor = self.position_map(self.position_waves)
        return table

    @torch.no_grad()
    def finished(self) -> WhisperForConditionalGeneration:
        """The model with its tables written out: nothing but Whisper is needed from here."""
        self.whisper.model.decoder.embed_tokens.weight.copy_(self.token_table())
        self.whisper.model.decoder.embed_positions.weight.copy_(self.position_table())
        return self.whisper


def _guide(seen: list[Tensor], batch: Batch) -> Tensor:
    """Mean of -log of the attention that falls where the token is heard, over the guided heads."""
    rows, columns = (batch.span_end > batch.span_begin).nonzero(as_tuple=True)
    if not len(rows):
        return seen[0].new_zeros(())
    begin, end = (span[rows, columns][:, None] for span in (batch.span_begin, batch.span_end))
    places = torch.arange(seen[0].shape[-1])
    is_inside = (places >= begin) & (places < end)  # [N, S]
    return torch.stack([-((head[rows, columns] * is_inside).sum(-1) + 1e-4).log().mean() for head in seen]).mean()


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float = 1.0, **_: object
) -> tuple[Tensor, None]:
    """Attention `[B, H, T, D]` -> `[B, T, H, D]`; cross-attention leaves its weights behind on the module."""
    if module.is_decoder and not module.is_causal:
        scores = query @ key.transpose(2, 3) * scaling
        module.seen = functional.softmax(scores.float(), dim=-1)  # [B, H, T, S]
        output = module.seen.to(value.dtype) @ value
    elif module.is_causal:
        output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    else:
        keys, values = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
        parts = (query * scaling).flatten(0, 1).split(_QUERY_CHUNK, 1)  # type: ignore[no-untyped-call]
        output = torch.cat([functional.softmax(part @ keys, dim=-1) @ values for part in parts], 1)
        output = output.view_as(query)
    return output.transpose(1, 2).contiguous(), None
