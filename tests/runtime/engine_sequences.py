"""Runs sequences on a real engine inside the event loop, as ModelManager.generate does from another thread.

Knows nothing of requests.
Used by the tests of what needs many sequences for one request.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from engine.engine import Engine
from engine.sequence import Sequence, SequenceOutput
from runtime.generation import GenerationRequest


@dataclass
class EngineSequences:
    """See the module; whoever waits steps for everybody."""

    engine: Engine
    requests: list[GenerationRequest] = field(default_factory=list)
    num_steps: int = 0
    _waiting: dict[int, deque[SequenceOutput]] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceOutput, None]:
        self.requests.append(request)
        sequence = Sequence(
            next(self._ids),
            list(request.prompt_token_ids),
            request.params,
            request.arrival_time_s,
            cache_salt=request.cache_salt,
            source=request.source,
        )
        outputs = self._waiting[sequence.sequence_id] = deque()
        self.engine.add(sequence)
        is_over = False
        try:
            while not is_over:
                await asyncio.sleep(0)  # so that all who begin together share the step
                if not outputs:
                    self._step()
                while outputs:
                    output = outputs.popleft()
                    if output.error is not None:
                        raise output.error
                    is_over = output.is_last
                    yield output
        finally:
            del self._waiting[sequence.sequence_id]
            if not is_over:
                self.engine.abort(sequence.sequence_id)

    def _step(self) -> None:
        self.num_steps += 1
        for output in self.engine.step():
            if output.sequence_id in self._waiting:
                self._waiting[output.sequence_id].append(output)
        self.engine.kv.check_integrity()
