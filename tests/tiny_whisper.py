"""A tiny Whisper: its tokenizer as the checkpoints have it, and a random model with the configs that go with it.

Knows nothing of what is tested with them.
Used by the tests of text/ and runtime/.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

LANGUAGES = ("en", "zh", "de", "es", "ms")
CORPUS = [
    " The quick brown fox jumps over the lazy dog, again and again.",
    " Hello world! How are you today? I am fine, thank you.",
    " one two three four five six seven eight nine ten",
    " Grüße aus Köln. ¿Qué tal? “Well,” he said (twice) - and left...",
    "你好，世界。 emoji 😀 and family",
]
NUM_TIMESTAMPS = 1501
_NUM_TEXT_TOKENS, _NUM_SPECIAL_TOKENS = 400, 8 + len(LANGUAGES)
# Windows of two seconds and no timestamps beyond: generate() treats them as it does those of thirty.
SHORT_SIZES = {
    "max_source_positions": 100,
    "max_target_positions": 64,
    "vocab_size": _NUM_TEXT_TOKENS + _NUM_SPECIAL_TOKENS + 101,
}


@lru_cache(maxsize=4)
def tokenizer(*, no_speech: str = "<|nospeech|>", has_timestamps: bool = True) -> Any:
    """Byte-level BPE and Whisper's special tokens in their order, over 400 tokens of text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=_NUM_TEXT_TOKENS, initial_alphabet=alphabet))
    state = json.loads(trained.to_str())["model"]
    made = WhisperTokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])
    special = [
        "<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
        "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", no_speech, "<|notimestamps|>",
    ]  # fmt: skip
    made.add_tokens([AddedToken(name, normalized=False, special=True) for name in special], special_tokens=True)
    if has_timestamps:  # as in the newer checkpoints, where they are tokens, but not special ones
        names = [f"<|{index * 0.02:.2f}|>" for index in range(NUM_TIMESTAMPS)]
        made.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    made.set_prefix_tokens()
    return made


def generation_config(**changes: Any) -> GenerationConfig:
    """What a multilingual checkpoint of today says; None takes a field away."""
    ids = tokenizer().get_vocab()
    fields: dict[str, Any] = {
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "is_multilingual": True,
        "lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        "suppress_tokens": [1, 2, 7, ids["<|startoftranscript|>"], ids["<|startofprev|>"], ids["<|nospeech|>"]],
        "begin_suppress_tokens": [ids["Ġ"], ids["<|endoftext|>"]],
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "alignment_heads": [[1, 0], [1, 1]],
    }
    made = GenerationConfig()
    for name, value in (fields | changes).items():
        if value is not None:
            setattr(made, name, value)
    return made


def config(**changes: Any) -> WhisperConfig:
    """Two layers of 64; as many positions as the real ones have."""
    ids = tokenizer().get_vocab()
    values: dict[str, Any] = {
        "vocab_size": len(ids),
        "num_mel_bins": 8,
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    return WhisperConfig(**(values | changes))


def model(seed: int = 0, **changes: Any) -> WhisperForConditionalGeneration:
    """Random weights, large enough that what is said depends on the sound."""
    torch.manual_seed(seed)
    made = WhisperForConditionalGeneration(config(**changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.15)
    made.generation_config = generation_config()
    return made


def write_checkpoint(directory: Path, seed: int = 0) -> WhisperForConditionalGeneration:
    """Writes a whole checkpoint whose windows are two seconds long; returns the model that is in it."""
    num_positions = SHORT_SIZES["max_source_positions"]
    made = model(seed, **SHORT_SIZES)
    made.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    extractor = WhisperFeatureExtractor(feature_size=made.config.num_mel_bins, chunk_length=num_positions // 50)
    extractor.save_pretrained(directory)
    return made
