"""Cuts the tokens of a transcript into words, so that each word can be given its time.

Knows nothing of tokenizers, times or speech models: it is handed the bytes of each token.
Called by runtime/word_timing.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

# Codes of languages that are written without spaces: there every character that is whole can be a word.
UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
_SENTENCE_ENDS = frozenset(".。!！?？")
_OPENING = frozenset("“‘«‹¿¡([{「『（《〈【")
_CLOSING = frozenset(".,!?:;…”’»›)]}。，．、！？：；」』）》〉】")
_EITHER = frozenset("\"'-")


@dataclass(frozen=True, slots=True)
class WordSpan:
    """A word and the tokens it is made of.

    Args:
        text: with the space before it, where there is one, and the punctuation at it.
        start, stop: tokens [start, stop).
        sound_start, sound_stop: those of them that are heard: punctuation lies in the pause beside a word.
    """

    text: str
    start: int
    stop: int
    sound_start: int
    sound_stop: int


@dataclass(frozen=True, slots=True)
class _Unit:
    """Tokens whose text is whole characters."""

    text: str
    start: int
    stop: int

    @property
    def marks(self) -> frozenset[str]:
        """Its characters, spaces around them aside."""
        return frozenset(self.text.strip())


def split_words(pieces: Sequence[bytes], *, is_spaced: bool = True) -> list[WordSpan]:
    """The words of a text, punctuation with the word it belongs to.

    Args:
        pieces: the bytes of each token; together UTF-8, but a character may lie in several.
        is_spaced: whether the language puts spaces between words; without, every whole character may be one.
    Returns:
        Words in order; their texts joined are the text, and every token is in one of them.
    """
    units = _units(pieces)
    groups = _at_spaces(units) if is_spaced else _at_characters(units)
    return [_span(group) for group in groups]


def ends_sentence(word: str) -> bool:
    """Whether a sentence ends with this word, quotes and brackets after the mark or not."""
    bare = word.rstrip().rstrip("\"'”’»›)]}」』）》〉】")
    return bool(bare) and bare[-1] in _SENTENCE_ENDS


def _units(pieces: Sequence[bytes]) -> list[_Unit]:
    """Tokens, joined where one ends in the middle of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    units: list[_Unit] = []
    text, start = "", 0
    for index, piece in enumerate(pieces):
        text += decoder.decode(piece)
        if decoder.getstate()[0]:
            continue
        units.append(_Unit(text, start, index + 1))
        text, start = "", index + 1
    if start < len(pieces):
        units.append(_Unit(text + decoder.decode(b"", final=True), start, len(pieces)))
    return units


def _at_spaces(units: Sequence[_Unit]) -> list[list[_Unit]]:
    groups: list[list[_Unit]] = []
    for unit in units:
        if groups and not unit.text[:1].isspace():
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups


def _at_characters(units: Sequence[_Unit]) -> list[list[_Unit]]:
    """What closes goes to the word before it, what opens, and spaces alone, to the word after it."""
    groups: list[list[_Unit]] = []
    is_open = False  # whether the last group waits for its word
    for unit in units:
        is_closing = bool(unit.text) and unit.marks <= _CLOSING | _EITHER and not unit.text[0].isspace()
        if groups and (is_open or is_closing or not unit.text):
            groups[-1].append(unit)
        else:
            groups.append([unit])
        is_open = (is_open or len(groups[-1]) == 1) and unit.marks <= _OPENING
    return groups


def _span(units: Sequence[_Unit]) -> WordSpan:
    first, last = 0, len(units)
    while last > 1 and units[last - 1].marks <= _CLOSING | _EITHER:
        last -= 1
    while first < last - 1 and units[first].marks <= _OPENING | _EITHER:
        first += 1
    return WordSpan(
        "".join(unit.text for unit in units),
        units[0].start,
        units[-1].stop,
        units[first].start,
        units[last - 1].stop,
    )
