"""Speaks in a process of its own, and in a new one where that dies.

The library of eSpeak crashes once in some ten thousand texts. Knows nothing of what is said.
`python -m demo.speech.speaking` is that process, its requests and answers pickled.
Called by train_whisper.py and evaluate_whisper.py.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import cast

from demo.speech.espeak import Manner, Speaker, Spoken

_TRIES = 3


class SpeakerProcess:
    """Answers like `Speaker`; text and manner decide the answer, whichever process gives it."""

    def __init__(self) -> None:
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "demo.speech.speaking"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def speak(self, text: str, manner: Manner) -> Spoken | None:
        """See `Speaker.speak`; None also for a text at which the library crashes again and again."""
        for _ in range(_TRIES):
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                pickle.dump((text, manner), self._process.stdin)
                self._process.stdin.flush()
                return cast(Spoken | None, pickle.load(self._process.stdout))
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                self.close()
                self._process = self._start()
        return None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Reads requests until there are no more."""
    speaker = Speaker()
    while True:
        try:
            text, manner = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(speaker.speak(text, manner), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
