"""Cuts the tokens of a transcript into words, so that each word can be given its time.

Knows nothing of tokenizers, times or speech models: it is handed the bytes of each token.
Called by runtime/word_timing.py.
"""

from __future__ import annotations

import codecs
import string
from collections.abc import Sequence
from dataclasses import dataclass

# Codes of languages that are written without spaces: there every character that is whole can begin a word.
UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
SENTENCE_ENDS = frozenset(".。!！?？")
# Marks that open belong to the word they stand before, marks that close to the word they stand after; straight quotes
# do either, by which side has the space.
_OPENING = frozenset("\"'“¡¿([{-")
_CLOSING = frozenset("\"'.。,，!！?？:：”)]}、")
_PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True, slots=True)
class WordSpan:
    """A word and the tokens it is made of.

    Args:
        text: with the space before it, where there is one.
        start, stop: tokens [start, stop).
    """

    text: str
    start: int
    stop: int


def split_words(pieces: Sequence[bytes], *, is_spaced: bool = True) -> list[WordSpan]:
    """The words of a text, punctuation with the word it belongs to.

    Args:
        pieces: the bytes of each token; together UTF-8, but a character may lie in several.
        is_spaced: whether the language puts spaces between words; without, every whole character may be one.
    Returns:
        Words in order; their texts joined are the text, and every token is in one of them.
    """
    units = _whole_units(pieces)
    words = _join_at_spaces(units) if is_spaced else units
    return _attach_closing(_attach_opening(words))


def ends_sentence(word: str) -> bool:
    """Whether a sentence ends with this word, quotes and brackets after the mark or not."""
    bare = word.rstrip().rstrip("\"'”)]}")
    return bool(bare) and bare[-1] in SENTENCE_ENDS


def _whole_units(pieces: Sequence[bytes]) -> list[WordSpan]:
    """Tokens, joined where one ends in the middle of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    units: list[WordSpan] = []
    text, start = "", 0
    for index, piece in enumerate(pieces):
        text += decoder.decode(piece)
        if decoder.getstate()[0]:
            continue
        units.append(WordSpan(text, start, index + 1))
        text, start = "", index + 1
    if start < len(pieces):
        units.append(WordSpan(text + decoder.decode(b"", final=True), start, len(pieces)))
    return units


def _join_at_spaces(units: list[WordSpan]) -> list[WordSpan]:
    words: list[WordSpan] = []
    for unit in units:
        stripped = unit.text.strip()
        is_mark = bool(stripped) and set(stripped) <= _PUNCTUATION
        if not words or is_mark or unit.text.startswith(" "):
            words.append(unit)
        else:
            words[-1] = _joined(words[-1], unit)
    return words


def _attach_opening(words: list[WordSpan]) -> list[WordSpan]:
    """An opening mark that has a space before it goes to the word after it, and so does a space alone."""
    joined: list[WordSpan] = []
    for word in reversed(words):
        is_opening = word.text.startswith(" ") and set(word.text.strip()) <= _OPENING
        # With a space on its other side too, it is a dash between words.
        if is_opening and joined and not joined[-1].text.startswith(" "):
            joined[-1] = _joined(word, joined[-1])
        else:
            joined.append(word)
    return joined[::-1]


def _attach_closing(words: list[WordSpan]) -> list[WordSpan]:
    """A closing mark without a space before it goes to the word before it."""
    joined: list[WordSpan] = []
    for word in words:
        is_closing = bool(word.text) and set(word.text) <= _CLOSING
        if joined and (is_closing or not word.text) and not joined[-1].text.endswith(" "):
            joined[-1] = _joined(joined[-1], word)
        else:
            joined.append(word)
    return joined


def _joined(one: WordSpan, other: WordSpan) -> WordSpan:
    return WordSpan(one.text + other.text, one.start, other.stop)
