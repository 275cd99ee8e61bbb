"""Random prompts of an exact number of tokens.

Knows nothing of servers; with no tokenizer at hand a word counts as a token.
Called by benchmarks/serve.py and benchmarks/offline.py.
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer

_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu")


class PromptSource:
    """Makes prompts that no two calls share, unless they ask for a common prefix.

    Args:
        tokenizer_path: a directory with tokenizer.json, or None: then a prompt has that many words.
        seed: the same seed gives the same prompts.
    """

    def __init__(self, tokenizer_path: Path | None, *, seed: int) -> None:
        self._random = random.Random(seed)
        if tokenizer_path is None:
            self._words = [" " + first + second for first in _SYLLABLES for second in _SYLLABLES]
        else:
            self._words = _one_token_words(Tokenizer.from_file(str(tokenizer_path / "tokenizer.json")))

    def make(self, num_tokens: int) -> str:
        """A prompt of `num_tokens` tokens."""
        return "".join(self._random.choices(self._words, k=num_tokens))


def _one_token_words(tokenizer: Tokenizer) -> list[str]:
    """Words with a space before them that are one token each, so that any run of them has as many tokens as words."""
    words = sorted(
        " " + token[1:]
        for token in tokenizer.get_vocab()
        if token[:1] in "Ġ▁" and token[1:].isalpha() and token.isprintable()
    )
    encodings = tokenizer.encode_batch(words, add_special_tokens=False)
    return [word for word, encoding in zip(words, encodings, strict=True) if len(encoding.ids) == 1]
