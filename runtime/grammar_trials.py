"""Tries grammars out in a process that may die of them, before this one compiles them.

Knows nothing of requests; a grammar that the process lives through costs this one no more than it cost there.
Owned by runtime/grammars.py, used by one thread at a time.

The compiler bounds most of what a grammar may cost, but not all: an intersection of eighteen patterns took it 5 s and
500 MB, one of thirty more than the machine had, and a thousand rules that lead from one to the next its stack.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from text.errors import GrammarError

if TYPE_CHECKING:
    from text.grammar_vocabulary import GrammarVocabulary

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 5.0
START_LIMIT_S = 60.0
_SCRIPT = Path(__file__).parent.parent / "text" / "grammar_trial.py"


class GrammarTrials:
    """The process, started when it is first needed and again after it died.

    Args:
        vocabulary: over which grammars are compiled.
        time_limit_s: for one grammar.
    """

    def __init__(self, vocabulary: GrammarVocabulary, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        from text.grammar import LIMITS

        self._time_limit_s = time_limit_s
        self._process: subprocess.Popen[str] | None = None
        self._first_line = json.dumps(
            {
                "tokens": [token.hex() for token in vocabulary.tokens],
                "special_ids": vocabulary.special_ids,
                "end_token_ids": vocabulary.end_token_ids,
                "limits": LIMITS,
            }
        )

    def check(self, source: str) -> None:
        """Compiles a grammar there; whether it was any good, compiling it here tells.

        Raises:
            GrammarError: the process did not live through it.
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        if not self._ask(process, json.dumps(source), self._time_limit_s):
            self.close()
            logger.warning("a grammar of %d characters was refused: it takes too much to compile", len(source))
            raise GrammarError(
                f"it takes more than {self._time_limit_s:g} s to compile, or too much memory, or it is nested too deep"
            )

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what it never read
                assert stream is not None  # both are pipes
                stream.close()
        process.wait()

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        process = subprocess.Popen(
            # Isolated, and without the script's directory among those that modules are looked for in.
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._process = process
        if not self._ask(process, self._first_line, START_LIMIT_S):
            self.close()
            raise RuntimeError("the process that tries out grammars does not start")
        return process

    def _ask(self, process: subprocess.Popen[str], line: str, time_limit_s: float) -> bool:
        """Whether the process answers a line in time."""
        assert process.stdin is not None  # both are pipes
        assert process.stdout is not None
        with _killed_after(process, time_limit_s):
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                return bool(process.stdout.readline())
            except OSError:  # it died before it had read all
                return False


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[str], time_limit_s: float) -> Iterator[None]:
    timer = threading.Timer(time_limit_s, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
