"""Checkpoints on disk that a real server can load within a second: a tiny random Llama and a tokenizer of bytes.

Knows nothing of servers.
Used by tests that start one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tests.api.scripted import byte_tokenizer
from tests.zoo import FAMILIES, instantiate


def write_checkpoint(directory: Path, **changes: Any) -> Path:
    """Writes config, weights and tokenizer; `changes` are values of the config. Returns the directory."""
    tokenizer = byte_tokenizer()
    values = {
        **FAMILIES["llama"].values,
        "vocab_size": len(tokenizer),
        # Room for outputs that last as long as a test needs them to.
        "max_position_embeddings": 100_000,
        **changes,
    }
    model = instantiate(AutoConfig.for_model("llama", **values))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
