"""What can be wrong with a recording; all of it is the caller's to mend.

Knows nothing of HTTP or of the engine's errors.
Raised throughout audio/; turned into answers by api/.

    ValueError
    └── AudioError              400: the bytes are no recording that is read here, or one that breaks a rule
        ├── UnreadableAudio     400: broken, or coded in a way that the decoder does not know
        └── AudioTooLong        413: longer than the limit
"""

from __future__ import annotations


class AudioError(ValueError):
    """The recording must change; the message names the rule and the value that breaks it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UnreadableAudio(AudioError):
    """A decoder could not go on; what it gave before that is sound."""


class AudioTooLong(AudioError):
    """The recording goes on beyond `max_seconds`; how long it is was not looked for."""

    def __init__(self, max_seconds: float) -> None:
        super().__init__(f"the audio is longer than {max_seconds:g} seconds, the most that is accepted")
        self.max_seconds = max_seconds
