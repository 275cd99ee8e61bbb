"""Learns a byte-level BPE from texts: words apart from their spaces, each digit alone, any text comes back as it was.

Knows nothing of chats, tasks or models.
Called by the modules that make the demo models' tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Words without the space before them, so that a word is cut the same way wherever it stands: most answers copy words
# from the prompt. Each digit alone, for the same reason. Marks, perhaps with a space before them; space.
_PIECES = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def learn(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """A tokenizer of at most so many tokens, the special ones first; the same texts give the same tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return core
