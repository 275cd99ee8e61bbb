"""What can be wrong with an upload that should be audio.

Knows nothing of HTTP; each message names what was found and the rule.
Raised throughout audio/; turned into answers by api/errors.py.

    AudioError      400: not audio, not readable, or nothing in it
    └── AudioTooLong  413: more audio than --max-audio-seconds
"""

from __future__ import annotations


class AudioError(Exception):
    """The upload cannot be transcribed."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AudioTooLong(AudioError):
    """The audio lasts longer than the server takes."""
