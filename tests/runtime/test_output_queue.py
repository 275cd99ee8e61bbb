"""What waits for a slow reader is merged into one output, and nothing of it is lost."""

from __future__ import annotations

import asyncio

import numpy as np

from engine.sequence import SequenceOutput, TokenLogprobs
from runtime.output_queue import OutputQueue


def test_what_comes_with_the_first_output_survives_merging() -> None:
    async def scenario() -> None:
        alignment = np.ones((1, 2, 3), dtype=np.float32)
        first = SequenceOutput(
            1,
            (5,),
            prompt_logprobs=(None, TokenLogprobs(-1.0)),
            scheduled_time_s=2.0,
            probed=(0.25, 0.5),
            alignment=alignment,
        )
        queue = OutputQueue()
        queue.put(first)
        queue.put(SequenceOutput(1, (6,), scheduled_time_s=2.0))
        queue.put(SequenceOutput(1, (7,), finish_reason="stop", stop_token_id=7, scheduled_time_s=2.0))
        merged = await queue.get()
        assert merged.token_ids == (5, 6, 7) and merged.finish_reason == "stop" and merged.stop_token_id == 7
        assert merged.probed == (0.25, 0.5) and merged.alignment is alignment
        assert merged.prompt_logprobs == first.prompt_logprobs

    asyncio.run(scenario())


def test_what_was_read_with_the_first_output_is_not_told_again() -> None:
    async def scenario() -> None:
        queue = OutputQueue()
        queue.put(SequenceOutput(1, (5,), probed=(0.25,)))
        assert (await queue.get()).probed == (0.25,)
        queue.put(SequenceOutput(1, (6,)))
        queue.put(SequenceOutput(1, (7,)))
        assert (await queue.get()).probed is None

    asyncio.run(scenario())
