"""Random-weight checkpoints of real shapes, with a tokenizer trained on the spot: speed tests without a download.

Knows nothing of servers or engines; any loader of transformers' checkpoints reads what it writes.
Called as `python -m benchmarks.models SHAPE DIRECTORY`, and by benchmarks/compare.py.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_TRAINED_TOKENS = 16_384  # a few seconds of training; the rest of a vocabulary is filled with made-up words
NUM_TRAINING_BYTES = 8_000_000

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The architecture and sizes of a real model."""

    model_type: str
    vocab_size: int
    values: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "llama-135m": Shape(
        "llama",
        49_152,
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "qwen-0.5b": Shape(
        "qwen2",
        151_936,
        {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
        },
    ),
}


def write_checkpoint(shape: Shape, directory: Path, *, seed: int = 0) -> None:
    """Write config, bf16 safetensors, generation config and tokenizer of `shape` into `directory`."""
    end = SPECIAL_TOKENS.index("<|im_end|>")
    ids = {"bos_token_id": 0, "eos_token_id": end, "pad_token_id": 0}
    config = AutoConfig.for_model(shape.model_type, vocab_size=shape.vocab_size, **ids, **shape.values)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    randomise(model)
    model.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(shape.vocab_size),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Random weights with varied outputs that never end: activations keep their size, special tokens score zero."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(std=weight.shape[1] ** -0.5)
        elif name.endswith("bias"):
            weight.normal_(std=0.1)
    # Signs at random: a tied embedding would otherwise make the model repeat its last token for ever.
    model.get_decoder().norm.weight.normal_()
    model.get_input_embeddings().weight[: len(SPECIAL_TOKENS)] = 0


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the sources of Python's own library; every id below `vocab_size` decodes to text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, NUM_TRAINED_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_library_sources(), trainer)
    trained = tokenizer.get_vocab()
    filled = Tokenizer(models.BPE(vocab={**trained, **_made_up_words(trained, vocab_size)}, merges=_merges(tokenizer)))
    filled.pre_tokenizer = tokenizer.pre_tokenizer
    filled.decoder = decoders.ByteLevel()
    filled.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return filled


def _library_sources() -> Iterator[str]:
    """Python's library, up to NUM_TRAINING_BYTES of it, in an order that does not depend on the disk."""
    budget = NUM_TRAINING_BYTES
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        yield text
        budget -= len(text)
        if budget <= 0:
            return


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(first, second) for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]


def _made_up_words(trained: dict[str, int], vocab_size: int) -> dict[str, int]:
    """Pairs of trained words for the ids that training left free; without merges they are decoded, never encoded."""
    words = sorted(token for token in trained if token.isascii() and token.isalpha())
    made_up: dict[str, int] = {}
    pairs = (first + second for second in words for first in words)
    while len(trained) + len(made_up) < vocab_size:
        word = next(pairs)
        if word not in trained and word not in made_up:
            made_up[word] = len(trained) + len(made_up)
    return made_up


def main() -> None:
    """Write the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(SHAPES[arguments.shape], arguments.directory, seed=arguments.seed)


if __name__ == "__main__":
    main()
