"""What one sequence asks of the engine, and the shape of whoever runs it.

Knows nothing of text, queues or threads; no torch here.
Made by api/ and by the parts of runtime/ that run many sequences for one request; ModelManager.generate is a Generate.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

from engine.sequence import SamplingParams, SequenceOutput, Source


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What one sequence of a request asks of the engine.

    Args:
        prompt_token_ids: at least one id, each below the vocabulary size.
        params: how to choose tokens, resolved.
        priority: lower runs first among those waiting.
        cache_salt: sequences of different salts never share KV.
        arrival_time_s: time.monotonic() of the request's arrival; queue and request timeouts count from it.
        source: what the encoder reads; None for models without one.
        submitted_time_s: for the later sequences of a request that is being served already: the time that decides
            their place in the queue. --max-queue-time is not for them, since their request has left the queue. Were
            their place their request's, a long recording would keep everyone who came after it waiting to its end.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: bytes = b""
    arrival_time_s: float = field(default_factory=time.monotonic)
    source: Source | None = None
    submitted_time_s: float | None = None

    @property
    def input_token_ids(self) -> Series[int]:
        """What the caller sent: the source's ids where there is one of text, else the prompt's."""
        if self.source is not None and self.source.token_ids is not None:
            return self.source.token_ids
        return self.prompt_token_ids


Generate = Callable[[GenerationRequest], AsyncGenerator[SequenceOutput, None]]
"""Runs one sequence and yields what its steps make; closing the iterator frees everything at once."""
