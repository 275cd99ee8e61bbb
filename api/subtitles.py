"""Subtitles in SubRip (srt) and WebVTT (vtt), cue by cue.

Knows nothing of where the cues come from or how they are sent.
Called by api/transcripts.py.
"""

from __future__ import annotations

from typing import Protocol


class SubtitleWriter(Protocol):
    """Writes one file of subtitles; the head and all cues, joined, are the file."""

    def head(self) -> str:
        """What the file begins with."""

    def cue(self, start_s: float, end_s: float, text: str) -> str:
        """The next cue with all its line breaks; nothing for a text that shows nothing."""


class SrtWriter:
    """SubRip: numbered cues, a comma before the milliseconds, a blank line after each cue."""

    def __init__(self) -> None:
        self._clock = _Clock()
        self._num_cues = 0

    def head(self) -> str:
        """Nothing."""
        return ""

    def cue(self, start_s: float, end_s: float, text: str) -> str:
        """A numbered cue; an arrow in its text would be taken for a line of times."""
        lines = _lines(text).replace("-->", "->")
        if not lines:
            return ""
        self._num_cues += 1
        start_ms, end_ms = self._clock.span_ms(start_s, end_s)
        return f"{self._num_cues}\n{_stamp(start_ms, ',')} --> {_stamp(end_ms, ',')}\n{lines}\n\n"


class VttWriter:
    """WebVTT: a header, a full stop before the milliseconds, text escaped as in HTML."""

    def __init__(self) -> None:
        self._clock = _Clock()

    def head(self) -> str:
        """The line by which players know it."""
        return "WEBVTT\n\n"

    def cue(self, start_s: float, end_s: float, text: str) -> str:
        """A cue without a number; escaping `>` takes care of arrows too."""
        lines = _lines(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        if not lines:
            return ""
        start_ms, end_ms = self._clock.span_ms(start_s, end_s)
        return f"{_stamp(start_ms, '.')} --> {_stamp(end_ms, '.')}\n{lines}\n\n"


class _Clock:
    """Times of one cue after the other: beginnings never fall, and no cue is shorter than it can be written."""

    def __init__(self) -> None:
        self._last_start_ms = 0

    def span_ms(self, start_s: float, end_s: float) -> tuple[int, int]:
        start_ms = max(_milliseconds(start_s), self._last_start_ms)
        self._last_start_ms = start_ms
        return start_ms, max(_milliseconds(end_s), start_ms + 1)


def _milliseconds(seconds: float) -> int:
    """To the nearest; rounded as a whole, so that 59.9996 s is a full minute and not 59 s and 1000 ms."""
    return round(seconds * 1000)


def _stamp(milliseconds: int, mark: str) -> str:
    """Hours always, as players of both kinds want; more than two digits when there are as many."""
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{mark}{milliseconds:03}"


def _lines(text: str) -> str:
    """The text without outer space and blank lines: a blank line would end the cue."""
    return "\n".join(line for line in map(str.strip, text.splitlines()) if line)
