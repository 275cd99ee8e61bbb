"""The process that speaks: its answers come back, and another one answers where it dies."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from demo.speech.espeak import Manner
from demo.speech.speaking import SpeakerProcess

_MANNER = Manner("en", 150, 50, 50, 0)
_ECHO = """
import pickle, sys
while True:
    text, manner = pickle.load(sys.stdin.buffer)
    if text == "crash":
        sys.exit(1)
    pickle.dump((text, manner.rate), sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


def said(echo: SpeakerProcess, text: str) -> Any:
    return echo.speak(text, _MANNER)


class Echo(SpeakerProcess):
    """Processes that say the text itself; the first few crash at once."""

    def __init__(self, num_crashes: int) -> None:
        self.num_started = 0
        self._num_crashes = num_crashes
        super().__init__()

    def _start(self) -> subprocess.Popen[bytes]:
        self.num_started += 1
        code = "" if self.num_started <= self._num_crashes else _ECHO
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_answers_come_in_the_order_of_the_texts() -> None:
    echo = Echo(num_crashes=0)
    assert [said(echo, text) for text in ("one", "two")] == [("one", 150), ("two", 150)]
    assert echo.num_started == 1
    echo.close()


def test_a_text_is_said_by_another_process_where_one_dies() -> None:
    echo = Echo(num_crashes=2)
    assert said(echo, "one") == ("one", 150)
    assert echo.num_started == 3
    echo.close()


def test_a_text_at_which_every_process_dies_is_left_out_and_the_next_one_is_said() -> None:
    echo = Echo(num_crashes=0)
    assert said(echo, "crash") is None
    assert said(echo, "two") == ("two", 150)
    echo.close()
