"""How far logits moved when weights were rounded: one text through both models, compared token by token.

Knows nothing of how weights are rounded, or of text: tokens come as ids.
Called by the loader with --hqq-report True.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Drift:
    """Of logits against those of the model they should be like.

    Args:
        num_positions: tokens compared.
        mean_kl: mean over positions of KL(expected || got), in nats.
        top1_agreement: share of positions whose likeliest token is the same.
        max_abs: largest difference of a logit.
        mean_abs: mean difference of a logit.
    """

    num_positions: int
    mean_kl: float
    top1_agreement: float
    max_abs: float
    mean_abs: float

    def __str__(self) -> str:
        return (
            f"drift of the logits against bfloat16 weights, over {self.num_positions} tokens: mean KL "
            f"{self.mean_kl:.4f} nats, same likeliest token at {self.top1_agreement:.1%}, "
            f"largest difference {self.max_abs:.3g}, mean {self.mean_abs:.3g}"
        )


def measure_drift(expected: Tensor, got: Tensor) -> Drift:
    """Compare logits [T, V] in float32."""
    difference = (got - expected).abs()
    target, log_probs = expected.log_softmax(dim=-1), got.log_softmax(dim=-1)
    kl = (target.exp() * (target - log_probs)).sum(dim=-1)
    return Drift(
        num_positions=expected.shape[0],
        mean_kl=float(kl.mean()),
        top1_agreement=float((expected.argmax(dim=-1) == got.argmax(dim=-1)).float().mean()),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
    )


@torch.inference_mode()
def trial_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Return a model's logits for a text, float32 [T, V] on the CPU.

    An encoder-decoder reads the text and writes it too; one that hears gets a noise, always the same.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    if not getattr(model.config, "is_encoder_decoder", False):
        return _plain(model(input_ids=ids, use_cache=False).logits)
    if model.main_input_name == "input_features":
        return _plain(model(input_features=_noise(model), decoder_input_ids=ids, use_cache=False).logits)
    return _plain(model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits)


def _noise(model: Any) -> Tensor:
    """Return features of a full window for a Whisper encoder: [1, mel bins, frames]."""
    config = model.config
    # Two convolutions halve the frames once.
    shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device=model.device, dtype=model.dtype)


def _plain(logits: Tensor) -> Tensor:
    return logits[0].float().cpu()
