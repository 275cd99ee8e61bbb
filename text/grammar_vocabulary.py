"""A model's vocabulary as grammars see it: the bytes of every token, which are special, and which end a text.

Knows nothing of grammars, but for what llguidance asks of a tokenizer.
Made by runtime/grammars.py, once a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from text.detokenizer import make_detokenizer
from text.errors import GrammarError
from text.token_bytes import token_bytes_of

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class GrammarVocabulary:
    """All tokens of a model.

    Args:
        tokens: the bytes of each, as many as the model has logits; empty for those that no text has.
        special_ids: tokens that are no text; their bytes are their names.
        end_token_ids: tokens that end a text, at least one.
    """

    tokens: tuple[bytes, ...]
    special_ids: tuple[int, ...]
    end_token_ids: tuple[int, ...]


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_token_ids: Iterable[int]
) -> GrammarVocabulary:
    """The vocabulary of a model.

    Args:
        tokenizer: of any kind.
        vocab_size: of the model; more than the tokenizer's where it is padded, less where the tokenizer is larger.
        end_token_ids: the model's own.
    Raises:
        GrammarError: there is no token that could end a text.
    """
    pieces = token_bytes_of(tokenizer)
    # Some tokenizers give a token for any id.
    num_tokens = min(len(tokenizer), vocab_size)
    special = {token_id for token_id in pieces.special_ids if token_id < num_tokens}
    # A model without EOS ends where it is told to: by any token that is no text.
    ends = {token_id for token_id in end_token_ids if token_id < vocab_size} or {*sorted(special)[:1]}
    if not ends:
        raise GrammarError("this model has no token that ends a text")
    tokens = [pieces.raw(token_id) for token_id in range(num_tokens)] + [b""] * (vocab_size - num_tokens)
    # No text holds the byte 0xFF, and llguidance marks special tokens by it.
    tokens = [b"" if b"\xff" in token else token for token in tokens]
    return GrammarVocabulary(tuple(tokens), tuple(sorted(special | ends)), tuple(sorted(ends)))


class _Tokenizer:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_ids
        self.eos_token_id = vocabulary.end_token_ids[0]

    def __call__(self, text: str) -> list[int]:
        """Some tokens of a text: of use where tokens are forced, which no grammar of ours does."""
        by_bytes = {token: token_id for token_id, token in enumerate(self.tokens) if token}
        return [by_bytes[byte] for byte in map(bytes, zip(text.encode(), strict=False)) if byte in by_bytes]


def make_tokenizer(vocabulary: GrammarVocabulary) -> LLTokenizer:
    """The vocabulary as llguidance reads it: half a second for 150,000 tokens."""
    from llguidance import LLTokenizer

    return LLTokenizer(_Tokenizer(vocabulary), eos_token=list(vocabulary.end_token_ids))  # type: ignore[arg-type]


def drops_first_space(tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int]) -> bool:
    """Whether a space that begins the first token after this prompt is no part of the text.

    Sentencepiece marks words by the space before them; where a text begins there is none, and decoding leaves it out.
    """
    pieces = token_bytes_of(tokenizer)
    if pieces.is_byte_level:
        return False
    token_id = pieces.word_id
    if token_id is None:
        return False
    detokenizer = make_detokenizer(tokenizer, prompt_token_ids)
    return not (detokenizer.push(token_id) + detokenizer.flush()).startswith(" ")
