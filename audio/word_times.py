"""Makes the times of words from those of their tokens, and mends what attention gets wrong at pauses.

Knows nothing of tokenizers or models: words come as text, with how many tokens each is made of.
Called by runtime/transcriber.py after alignment.py, once per window.

What attention gets wrong: the silence after a sentence or before a segment is heard as part of a word beside it. No
word is taken to last longer than twice what is typical there. Punctuation has no sound, so it goes to the word it
stands at, whose times stay. These are the rules of OpenAI's implementation, but for three things: words are given per
segment, so that none reaches into the next; nothing depends on where the window lies in the recording; and the times of
segments are left as the model wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

# A typical word is at most this long, whatever the median says: few words make a poor median.
_MAX_TYPICAL_S = 0.7
# Times the typical duration.
_LONG = 2
_PAUSE = 4
# How far a word may reach beyond its segment.
_SLACK_S = 0.5
_SENTENCE_ENDS = frozenset(".。!！?？")
_OPENING = frozenset("\"'“¿([{-")
_CLOSING = frozenset("\"'.。,，!！?？:：”)]}、")


@dataclass(frozen=True, slots=True)
class TimedWord:
    """A word, with the space before it where the language writes one, in seconds from the beginning of the window."""

    text: str
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """How long it lasts."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class SegmentWords:
    """The words of one segment, in order.

    Args:
        words: as the tokenizer splits them, bare punctuation being words too.
        token_counts: how many tokens each is made of.
        start_s, end_s: the segment's time as the model wrote it, from the beginning of the window; None if it did not.
    """

    words: Sequence[str]
    token_counts: Sequence[int]
    start_s: float | None = None
    end_s: float | None = None


def time_words(
    token_times: Sequence[tuple[float, float]], segments: Sequence[SegmentWords], *, previous_end_s: float = 0.0
) -> list[list[TimedWord]]:
    """The words of each segment with their times, which never overlap and never run backwards.

    Args:
        token_times: start and end of every token of every segment, in order.
        segments: that these tokens make up.
        previous_end_s: where the last word before the window ended, from the beginning of the window: 0 or less.

    Raises:
        ValueError: the segments have more or fewer tokens than have times, or words without tokens.
    """
    counts = [count for segment in segments for count in segment.token_counts]
    if sum(counts) != len(token_times) or min(counts, default=1) < 1:
        raise ValueError(f"words of {sum(counts)} tokens, each at least 1, are wanted for {len(token_times)} tokens")
    words = _group(token_times, [word for segment in segments for word in segment.words], counts)
    durations = [word.duration_s for word in words if word.duration_s > 0]
    typical_s = min(_MAX_TYPICAL_S, float(np.median(durations))) if durations else 0.0
    words = _shorten_after_sentences(words, _LONG * typical_s)
    timed, position = [], 0
    for segment in segments:
        own = _merge_punctuation(words[position : position + len(segment.words)])
        position += len(segment.words)
        if own and typical_s:
            own = _shorten_after_pause(own, previous_end_s, typical_s)
            own = _keep_to_segment(own, segment, typical_s)
        if own:
            previous_end_s = own[-1].end_s
        timed.append(own)
    return timed


def _group(
    token_times: Sequence[tuple[float, float]], words: Sequence[str], token_counts: Sequence[int]
) -> list[TimedWord]:
    """Each word from the beginning of its first token to the end of its last."""
    grouped, position = [], 0
    for text, count in zip(words, token_counts, strict=True):
        grouped.append(TimedWord(text, token_times[position][0], token_times[position + count - 1][1]))
        position += count
    return grouped


def _shorten_after_sentences(words: list[TimedWord], longest_s: float) -> list[TimedWord]:
    """A word after the end of a sentence begins late rather than in the silence before it."""
    shortened = words[:1]
    for before, word in pairwise(words):
        is_late = before.text.strip() in _SENTENCE_ENDS and word.duration_s > longest_s
        shortened.append(replace(word, start_s=word.end_s - longest_s) if is_late else word)
    return shortened


def _merge_punctuation(words: list[TimedWord]) -> list[TimedWord]:
    """Marks join the word before them, or the one after them if they open something; blanks are left out."""
    merged: list[TimedWord] = []
    opening = ""
    opened_s = 0.0
    for word in words:
        mark = word.text.strip()
        if not mark:
            continue
        if word.text[0] == " " and set(mark) <= _OPENING:
            opened_s = opened_s if opening else word.start_s
            opening += word.text
        elif merged and not opening and mark == word.text and set(mark) <= _CLOSING:
            merged[-1] = replace(merged[-1], text=merged[-1].text + mark)
        else:
            merged.append(replace(word, text=opening + word.text))
            opening = ""
    if opening:
        merged.append(TimedWord(opening, opened_s, words[-1].end_s))
    return merged


def _shorten_after_pause(words: list[TimedWord], previous_end_s: float, typical_s: float) -> list[TimedWord]:
    """The first two words after a pause do not begin in it."""
    longest_s = _LONG * typical_s
    first, *rest = words
    are_two_long = bool(rest) and rest[0].end_s - first.start_s > 2 * longest_s
    if first.end_s - previous_end_s <= _PAUSE * typical_s or not (first.duration_s > longest_s or are_two_long):
        return words
    if rest and rest[0].duration_s > longest_s:
        second = rest[0]
        border_s = max((first.start_s + second.end_s) / 2, second.end_s - longest_s)
        first = replace(first, end_s=border_s)
        rest[0] = replace(second, start_s=border_s)
    return [replace(first, start_s=max(first.start_s, first.end_s - longest_s)), *rest]


def _keep_to_segment(words: list[TimedWord], segment: SegmentWords, typical_s: float) -> list[TimedWord]:
    """The first and last words do not reach far beyond their segment."""
    first = words[0]
    if segment.start_s is not None and first.start_s + _SLACK_S < segment.start_s < first.end_s:
        start_s = max(first.start_s, min(first.end_s - typical_s, segment.start_s))
        words = [replace(first, start_s=start_s), *words[1:]]
    last = words[-1]
    if segment.end_s is not None and last.start_s < segment.end_s < last.end_s - _SLACK_S:
        words = [*words[:-1], replace(last, end_s=min(last.end_s, max(last.start_s + typical_s, segment.end_s)))]
    return words
