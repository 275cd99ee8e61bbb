"""Compiles grammars that might be hostile, in a process of its own that may run out of time, memory or stack.

Knows nothing of who asks; imports nothing of ours, so that it starts in a tenth of a second.
Run as a script by runtime/grammar_trials.py: a line of JSON in, a line out when it has lived through it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from typing import Any

# A sixteenth of what threads of a server usually have: what fits here fits there.
STACK_BYTES = 512 << 10
# Beyond what the vocabulary takes.
MEMORY_BYTES = 384 << 20


class _Tokenizer:
    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[str], special_ids: list[int], end_token_ids: list[int]) -> None:
        self.tokens = [bytes.fromhex(token) for token in tokens]
        self.special_token_ids = special_ids
        self.eos_token_id = end_token_ids[0]

    def __call__(self, text: str) -> list[int]:
        return []


def _bound_memory() -> None:
    """Where the system can: elsewhere the time limit bounds it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        import psutil

        limit = psutil.Process().memory_info().vms + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve() -> None:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    first = json.loads(sys.stdin.readline())
    ends = first["end_token_ids"]
    wrapper: Any = _Tokenizer(first["tokens"], first["special_ids"], ends)
    tokenizer = LLTokenizer(wrapper, eos_token=ends)
    limits = LLParserLimits(**first["limits"])
    _bound_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        print("done", flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()
