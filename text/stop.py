"""Watches a growing text for stop strings and holds back what may begin one.

Knows nothing of tokens; text comes in pieces of any size and the result does not depend on how it was cut.
Called by output.py, once a piece.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string.

    The string that is complete first wins; of two complete at the same character, the longer. Time is linear in the
    text: one automaton (Knuth, Morris and Pratt's) a stop string, whose state says how much of it the text ends with.

    Args:
        stop: the strings, none empty.
        include_stop: whether the text keeps the string that stopped it.
    """

    __slots__ = ("_fallbacks", "_first_chars", "_held", "_include_stop", "_matched", "_states", "_stop")

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        if not all(stop):
            raise ValueError("a stop string must not be empty")
        # Longest first: of several that end at one character the first found is then the right one.
        self._stop = tuple(sorted(set(stop), key=len, reverse=True))
        self._fallbacks = tuple(_fallback_table(string) for string in self._stop)
        self._first_chars = frozenset(string[0] for string in self._stop)
        self._include_stop = include_stop
        self._states = [0] * len(self._stop)
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was met, if one was."""
        return self._matched

    def push(self, text: str) -> str:
        """Takes the next piece; returns what is now certain to be text (nothing more once a stop string was met)."""
        if self._matched is not None:
            return ""
        if not self._held and self._first_chars.isdisjoint(text):
            return text
        text = self._held + text
        for position in range(len(self._held), len(text)):
            matched = self._advance(text[position])
            if matched is not None:
                self._matched, self._held = matched, ""
                end = position + 1
                return text[: end if self._include_stop else end - len(matched)]
        num_held = max(self._states)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back: nothing more will come, so it begins no stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Moves every automaton by one character; returns the string that is now complete, if one is."""
        for index, string in enumerate(self._stop):
            state = self._states[index]
            while state and string[state] != char:
                state = self._fallbacks[index][state - 1]
            if string[state] == char:
                state += 1
            if state == len(string):
                return string
            self._states[index] = state
        return None


def _fallback_table(string: str) -> list[int]:
    """For each prefix of a string, the length of its longest proper suffix that is also its prefix."""
    table = [0] * len(string)
    length = 0
    for index in range(1, len(string)):
        while length and string[index] != string[length]:
            length = table[length - 1]
        if string[index] == string[length]:
            length += 1
        table[index] = length
    return table
