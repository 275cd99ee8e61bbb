"""What a sequence's keys, values and states take, found without weights: the engine's own trial on a drawn model.

Knows nothing of budgets or machines; what a trial without values cannot tell (whether logits agree) it leaves open.
Called by runtime/planning.py with a model of model/blueprint.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from engine.model.attention import NotFlat
from engine.model.runner import SoloRunner
from engine.model.selfcheck import SoloSizes, measure_solo, record_shapes, why_not_flat
from engine.model.valueless import META, valueless

logger = logging.getLogger(__name__)

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, NotImplementedError)
"""What a model may raise when it is run without values; an answer, not an accident."""

_LENGTHS = (8, 40)


class NotMeasurable(Exception):
    """This model's forward depends on values: what a sequence takes is known once it is loaded."""


@dataclass(frozen=True, slots=True)
class KVCost:
    """What a sequence takes.

    Args:
        lane: flat, solo or seq2seq; the one expected.
        is_certain: whether the check at load cannot decide otherwise.
        reason: why this lane.
        bytes_per_token: of each token of a decoder-only sequence, or of an encoder-decoder's output.
        bytes_fixed: of a sequence whatever its length: recurrent and convolution states.
        bytes_per_source_position: of keys and values of cross-attention, for each position of the encoder's output.
        num_source_positions: of every source, where they do not depend on it (speech); None where they do.
        windows: how many layers see only a window, and the smallest one; None without.
    """

    lane: str
    is_certain: bool
    reason: str
    bytes_per_token: int
    bytes_fixed: int = 0
    bytes_per_source_position: int = 0
    num_source_positions: int | None = None
    windows: tuple[int, int] | None = None


def measure_kv(model: Any) -> KVCost:
    """What a sequence of a drawn model takes, and by which lane it would be served.

    Raises:
        NotMeasurable: the forward depends on values.
    """
    if model.config.is_encoder_decoder:
        return _encoder_decoder(model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the others sort tokens by expert, which is a value
    reason, is_certain = why_not_flat(model.config), True
    with valueless():
        if reason is None:
            try:
                shapes = record_shapes(model, META)
            except NotFlat as refusal:
                reason = str(refusal)
            except _FAILURES as failure:
                logger.debug("the flat trial without values failed", exc_info=failure)
                reason, is_certain = "the check at load decides", False
            else:
                return KVCost(
                    "flat", False, "if the check at load finds its logits exact, else solo",
                    sum(shape.bytes_per_token for shape in shapes), windows=_windows(model.config),
                )  # fmt: skip
        sizes = _solo(model)
    return KVCost("solo", is_certain, reason, sizes.per_token, sizes.fixed, windows=_windows(model.config))


def _solo(model: Any) -> SoloSizes:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    try:
        return measure_solo(SoloRunner(model, META), vocab_size)
    except _FAILURES as failure:
        raise NotMeasurable(f"{type(failure).__name__}: {str(failure).splitlines()[0]}") from failure


def _encoder_decoder(model: Any) -> KVCost:
    """Caches of a forward over sources and outputs of two lengths each."""
    num_positions = getattr(model.config, "max_source_positions", None) if _hears(model) else None
    sources = (num_positions,) if num_positions else _LENGTHS
    try:
        with valueless():
            caches = [_cache(model, source, target) for source, target in zip(sources * 2, _LENGTHS, strict=False)]
    except _FAILURES as failure:
        raise NotMeasurable(f"{type(failure).__name__}: {str(failure).splitlines()[0]}") from failure
    own = [_cache_bytes(cache.self_attention_cache) for cache in caches]
    cross = [_cache_bytes(cache.cross_attention_cache) for cache in caches]
    return KVCost(
        "seq2seq", True, "an encoder-decoder",
        bytes_per_token=(own[1] - own[0]) // (_LENGTHS[1] - _LENGTHS[0]),
        bytes_per_source_position=cross[0] // sources[0],
        num_source_positions=num_positions,
    )  # fmt: skip


def _hears(model: Any) -> bool:
    return bool(model.main_input_name == "input_features")


def _cache(model: Any, num_source: int, num_target: int) -> Any:
    """The cache after one forward."""
    if _hears(model):
        # Two convolutions halve the frames once.
        source = {"input_features": torch.zeros(1, model.config.num_mel_bins, 2 * num_source, dtype=model.dtype)}
    else:
        source = {"input_ids": torch.zeros(1, num_source, dtype=torch.int64)}
    output = model(**source, decoder_input_ids=torch.zeros(1, num_target, dtype=torch.int64), use_cache=True)
    return output.past_key_values


def _cache_bytes(cache: Any) -> int:
    return sum(
        tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values)
    )


def _windows(config: Any) -> tuple[int, int] | None:
    """How many layers see only a window, and its size."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or not getattr(text, "use_sliding_window", True):
        return None
    layer_types = getattr(text, "layer_types", None)
    if layer_types is None:
        return text.num_hidden_layers, window
    num_sliding = sum(1 for kind in layer_types if kind == "sliding_attention")
    return (num_sliding, window) if num_sliding else None
