"""The engine sequences of one request that needs many, each run to its end and given back whole.

Knows nothing of what the sequences are for.
Made by the transcriber, one for each request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.sequence import SamplingParams, SequenceOutput, Source
from runtime.generation import Generate, GenerationRequest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """All that one sequence made.

    Args:
        token_ids: generated, without the one that ended it.
        logprobs: of every token that was chosen, the one that ended it included; empty unless asked for.
        probed: see SequenceOutput.
        alignment: see SequenceOutput.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    probed: tuple[float, ...] | None = None
    alignment: npt.NDArray[np.float32] | None = None


class RequestSequences:
    """Runs sequences for one request; they share its priority, its salt and its time limit.

    Args:
        generate: runs one.
        priority, cache_salt, arrival_time_s: the request's.
    """

    def __init__(
        self, generate: Generate, *, priority: int = 0, cache_salt: bytes = b"", arrival_time_s: float
    ) -> None:
        self._generate = generate
        self._priority = priority
        self._cache_salt = cache_salt
        self._arrival_time_s = arrival_time_s
        self._has_begun = False

    async def run(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        source: Source | None,
        *,
        submitted_time_s: float | None = None,
    ) -> SequenceResult:
        """Runs one to its end; cancelling frees it at once.

        The first sequence of the request has the request's place in the queue.

        Args:
            prompt_token_ids, params, source: see GenerationRequest.
            submitted_time_s: the place in the queue of any other; None for the end.
        Raises:
            ServerError: whatever the sequence failed with.
        """
        if not self._has_begun:
            self._has_begun, submitted_time_s = True, None
        elif submitted_time_s is None:
            submitted_time_s = time.monotonic()
        request = GenerationRequest(
            list(prompt_token_ids),
            params,
            priority=self._priority,
            cache_salt=self._cache_salt,
            arrival_time_s=self._arrival_time_s,
            source=source,
            submitted_time_s=submitted_time_s,
        )
        token_ids: list[int] = []
        logprobs: list[float] = []
        first: SequenceOutput | None = None
        async with aclosing(self._generate(request)) as outputs:
            async for output in outputs:
                first = first or output
                token_ids += output.token_ids
                logprobs += [entry.logprob for entry in output.logprobs or ()]
                if output.stop_token_id is not None:
                    token_ids.pop()
        assert first is not None  # a sequence without output raises
        return SequenceResult(tuple(token_ids), tuple(logprobs), first.probed, first.alignment)
