"""The demo speech model's tokenizer: byte-level BPE learnt from its words, then Whisper's marks in Whisper's order.

Knows nothing of sound or of the model.
Called by train_whisper.py, whisper_examples.py and evaluate_whisper.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from demo.speech.vocabulary import DIGITS, draw_words

TEXT_END, START, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
PREVIOUS, NO_SPEECH = "<|startofprev|>", "<|nospeech|>"
TASKS = ("translate", "transcribe")
# Whisper's list as far as Malay, since programs find a language by its place in it; the model speaks DIGITS' languages.
LANGUAGE_MARKS = tuple(f"<|{code}|>" for code in list(LANGUAGES)[: list(LANGUAGES).index("ms") + 1])
SPECIAL_TOKENS = (
    START, *LANGUAGE_MARKS, *(f"<|{task}|>" for task in TASKS), "<|startoflm|>", PREVIOUS, NO_SPEECH, NO_TIMESTAMPS
)  # fmt: skip
TIMESTAMPS = tuple(f"<|{position * 0.02:.2f}|>" for position in range(1501))
MAX_POSITIONS = 448
_NUM_PIECES = 512


def train_tokenizer(seed: int) -> WhisperTokenizer:
    """A tokenizer learnt from what is said in the corpus; the same seed gives the same tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(_texts(seed), trainer)
    vocab: dict[str, int] = core.get_vocab(with_added_tokens=False)
    merges = [tuple(pair) for pair in _merges(core)]
    tokenizer = WhisperTokenizer(vocab=vocab | {TEXT_END: len(vocab)}, merges=merges, model_max_length=MAX_POSITIONS)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.add_tokens([_plain(mark) for mark in TIMESTAMPS])
    return tokenizer


def _plain(mark: str) -> object:
    from tokenizers import AddedToken

    return AddedToken(mark, lstrip=False, rstrip=False, normalized=False, special=False)


def _merges(core: Tokenizer) -> list[list[str]]:
    import json

    merges: list[list[str]] = json.loads(core.to_str())["model"]["merges"]
    return merges


def _texts(seed: int, num_texts: int = 6000) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(num_texts):
        words = draw_words(rng, rng.choice(("en", "en", "en", *DIGITS)), 6)
        yield written(words)


def written(words: tuple[str, ...], is_cut: bool = False) -> str:
    """What is said in one breath as text: each word after a space, a full stop where it is not cut off."""
    return "".join(" " + word for word in words) + ("" if is_cut or not words else ".")
