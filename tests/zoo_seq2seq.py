"""Tiny random encoder-decoders, one of each habit of positions and biases, and what `generate` says of them.

Knows nothing of the engine or the server; the twin of tests/zoo.py, whose vocabulary and randomising it shares.
Called by tests of the engine and the API.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, GenerationConfig, PreTrainedModel

from tests.zoo import VOCAB_SIZE, Family, randomise

START_ID = 2
MAX_POSITIONS = 128
# No EOS: outputs have the length that was asked for.
SPECIAL_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": START_ID}

_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
# Few buckets over a short distance, so that tests pass the last one.
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 24}
_BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": MAX_POSITIONS,
}
_GEMMA_SIDE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 12,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": MAX_POSITIONS,
}

FLAT_FAMILIES: dict[str, Family] = {
    "t5": Family("t5", _T5, 0.2),
    "t5_gated": Family("t5", {**_T5, "feed_forward_proj": "gated-gelu"}, 0.2),
    "mt5": Family("mt5", _T5, 0.2),
    "umt5": Family("umt5", _T5, 0.2),
    "bart": Family("bart", _BART, 0.09),
    "mbart": Family("mbart", _BART),
    "marian": Family("marian", {**_BART, "scale_embedding": True}, 0.09),
    "pegasus": Family("pegasus", _BART, 0.16),
    "m2m_100": Family("m2m_100", _BART, 0.2),
    "blenderbot": Family("blenderbot", _BART, 0.2),
    "t5gemma": Family("t5gemma", {"encoder": _GEMMA_SIDE, "decoder": _GEMMA_SIDE}),
}
SOLO_FAMILIES: dict[str, Family] = {
    "led": Family("led", {**_BART, "attention_window": 16, "max_decoder_position_embeddings": MAX_POSITIONS}, 0.09),
    "switch_transformers": Family(
        "switch_transformers", {**_T5, "num_experts": 4, "num_sparse_decoder_layers": 1}, 0.2
    ),
    "pegasus_x": Family("pegasus_x", {**_BART, "num_global_tokens": 4, "block_size": 8}, 0.16),
    "prophetnet": Family(
        "prophetnet",
        {
            "hidden_size": 64,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
        },
    ),
}
FAMILIES = {**FLAT_FAMILIES, **SOLO_FAMILIES}

NUM_MEL_BINS = 16
NUM_SOURCE_POSITIONS = 30  # half as many as frames
WHISPER: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_mel_bins": NUM_MEL_BINS,
    "max_source_positions": NUM_SOURCE_POSITIONS,
    "max_target_positions": MAX_POSITIONS,
}


def make(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Build the tiny model called `name`, in float32 and eval mode.

    Raises:
        KeyError: no family has that name.
    """
    family = FAMILIES[name]
    shared = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": False, **SPECIAL_TOKEN_IDS}
    config = AutoConfig.for_model(family.model_type, **{**shared, **family.values})
    return _instantiate(AutoModelForSeq2SeqLM, config, seed, family.weight_std)


def make_whisper(*, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a tiny Whisper; `changes` are values of its config."""
    shared = {"vocab_size": VOCAB_SIZE, **SPECIAL_TOKEN_IDS}
    config = AutoConfig.for_model("whisper", **{**shared, **WHISPER, **changes})
    return _instantiate(AutoModelForSpeechSeq2Seq, config, seed, 0.2)


def _instantiate(factory: Any, config: Any, seed: int, weight_std: float) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = factory.from_config(config, dtype=torch.float32)
        randomise(model, weight_std=weight_std)
    # The model's choice alone: nothing forced, nothing suppressed.
    model.generation_config = GenerationConfig(**SPECIAL_TOKEN_IDS, do_sample=False)
    return model.eval()


def features(*, seed: int = 0) -> npt.NDArray[np.float32]:
    """A random spectrogram for the tiny Whisper: [mel bins, frames]."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((NUM_MEL_BINS, 2 * NUM_SOURCE_POSITIONS)).astype(np.float32)


def is_diverse(outputs: list[list[int]]) -> bool:
    """Whether outputs of different sources prove anything: all differ, and they hold a good many tokens."""
    return len({tuple(output) for output in outputs}) == len(outputs) and len({t for o in outputs for t in o}) >= 24


@torch.no_grad()
def generate(
    model: PreTrainedModel, source: list[int], max_new_tokens: int, *, prompt: list[int] | None = None, **options: Any
) -> list[int]:
    """What `model.generate` answers, greedily unless `options` say otherwise; the new tokens only."""
    prompt = [START_ID] if prompt is None else prompt
    ids = torch.tensor([source])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        decoder_input_ids=torch.tensor([prompt]),
        **{"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, **options},
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
