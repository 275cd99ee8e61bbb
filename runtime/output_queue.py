"""Where one sequence's outputs wait for its request, merged while the request is busy.

Knows nothing of engines or HTTP; lives on the event loop only.
Filled and read by model_manager.py.
"""

from __future__ import annotations

import asyncio

from engine.errors import ServerError
from engine.sequence import SequenceOutput, TokenLogprobs


class OutputQueue:
    """The outputs of one sequence, for one reader.

    Whatever arrives while the reader is elsewhere becomes one output: nothing is lost, nothing waits, and what a reader
    who never comes can cost is bounded by its own max_tokens.
    """

    __slots__ = ("_error", "_first", "_logprobs", "_newest", "_token_ids", "_waiter")

    def __init__(self) -> None:
        self._first: SequenceOutput | None = None
        self._newest: SequenceOutput | None = None
        # Filled from the second waiting output on, and in place: joining tuples at each arrival would be quadratic.
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._error: ServerError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: SequenceOutput) -> None:
        """Adds what a step made; never blocks."""
        if output.error is not None:
            self.fail(output.error)
            return
        if self._first is None:
            self._first = output
        else:
            if self._newest is None:
                self._extend(self._first)
            self._extend(output)
            self._newest = output
        self._wake()

    def fail(self, error: ServerError) -> None:
        """Ends the sequence with an error, after what is already there; the first error stays."""
        if self._error is None:
            self._error = error
            self._wake()

    async def get(self) -> SequenceOutput:
        """Everything that waits, as one output.

        Raises:
            ServerError: the one that ended the sequence, once all before it has been read.
        """
        while self._first is None:
            if self._error is not None:
                raise self._error.with_traceback(None)  # it may be shared with other sequences
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        output = self._first if self._newest is None else self._merged(self._first, self._newest)
        self._first = self._newest = None
        return output

    def _extend(self, output: SequenceOutput) -> None:
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs or ()

    def _merged(self, first: SequenceOutput, newest: SequenceOutput) -> SequenceOutput:
        output = SequenceOutput(
            sequence_id=first.sequence_id,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs) if first.logprobs is not None or newest.logprobs is not None else None,
            prompt_logprobs=first.prompt_logprobs,
            finish_reason=newest.finish_reason,
            stop_token_id=newest.stop_token_id,
            num_cached_tokens=newest.num_cached_tokens,
            scheduled_time_s=first.scheduled_time_s,
            probed=first.probed,
            alignment=first.alignment,
        )
        self._token_ids, self._logprobs = [], []
        return output

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
