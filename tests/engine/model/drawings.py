"""Tiny models twice: drawn from their config without weights, and real, for tests that hold one against the other.

Knows nothing of what is compared.
Called by test_blueprint.py and test_kv_cost.py.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig

from engine.model.blueprint import draw
from engine.model.loader import LoadRequest
from tests.zoo import FAMILIES, SPECIAL_TOKEN_IDS, VOCAB_SIZE

_SIDES = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
# Decoders of more layers than encoders, and heads that are not hidden size / heads: mistaken for each other, they show.
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "AutoModelForSeq2SeqLM",
        {"d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4},
    ),
    "bart": ("AutoModelForSeq2SeqLM", _SIDES),
    "bigbird_pegasus": ("AutoModelForSeq2SeqLM", {**_SIDES, "max_position_embeddings": 128}),
    "whisper": ("AutoModelForSpeechSeq2Seq", {**_SIDES, "num_mel_bins": 20, "max_source_positions": 60}),
}


def class_of(name: str) -> str:
    """What --model-type would be."""
    return ENCODER_DECODERS[name][0] if name in ENCODER_DECODERS else "AutoModelForCausalLM"


def config_of(name: str, **changes: Any) -> Any:
    """A fresh config of the family called `name`; building a model changes it."""
    special = {**SPECIAL_TOKEN_IDS, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name in ENCODER_DECODERS:
        return AutoConfig.for_model(name, vocab_size=VOCAB_SIZE, **special, **ENCODER_DECODERS[name][1] | changes)
    family = FAMILIES[name]
    shared = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": False, **SPECIAL_TOKEN_IDS}
    return AutoConfig.for_model(family.model_type, **{**shared, **family.values, **changes})


def drawn(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model without weights."""
    return draw(LoadRequest("drawn", model_type=class_of(name)), config_of(name, **changes), dtype)


def real(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model with the weights that transformers starts from."""
    config = config_of(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, class_of(name)).from_config(config, dtype=dtype).eval()
