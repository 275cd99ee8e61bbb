"""A file in memory that ends when the time for reading it is over.

Knows nothing of audio.
Made by decode.py for the readers: what a decoder does inside one call into C cannot be stopped, but it can be starved.
"""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class TimedBytes(io.BytesIO):
    """Bytes to read until a moment, after which the file looks as if it ended where it is.

    Args:
        data: the file.
        deadline_s: on the clock of time.monotonic().
    """

    def __init__(self, data: bytes, deadline_s: float) -> None:
        super().__init__(data)
        self._deadline_s = deadline_s

    @property
    def has_expired(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._deadline_s

    def rest(self) -> bytes:
        """What was not read yet."""
        return self.getvalue()[self.tell() :]

    def followed_by(self, data: bytes) -> TimedBytes:
        """Another file that ends at the same moment."""
        return TimedBytes(data, self._deadline_s)

    def read(self, size: int | None = -1, /) -> bytes:
        """As any file's; empty after the deadline."""
        return b"" if self.has_expired else super().read(size)

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """As any file's; 0 after the deadline."""
        return 0 if self.has_expired else super().readinto(buffer)
