"""Beam search over the engine: each step runs one single-token sequence for every live beam.

Knows nothing of text. What beams share is computed once, since the engine reuses the beginnings of sequences and the
encoder's output; which beams live on is decided in runtime/beams.py.
Called by api/.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from engine.sequence import SequenceOutput
from runtime.beams import BeamParams, Beams, Hypothesis
from runtime.generation import Generate, GenerationRequest


@dataclass(frozen=True, slots=True)
class BeamResult:
    """What a search found.

    Args:
        hypotheses: the best, best first; all have ended.
        num_cached_tokens: of the prompt, reused in the first step.
        scheduled_time_s: time.monotonic() of the first step.
    """

    hypotheses: tuple[Hypothesis, ...]
    num_cached_tokens: int
    scheduled_time_s: float | None


async def beam_search(
    generate: Generate, request: GenerationRequest, params: BeamParams, end_token_ids: frozenset[int]
) -> BeamResult:
    """The best continuations of a prompt, as generate(num_beams=...) finds them.

    Args:
        generate: runs one sequence.
        request: the prompt; of its sampling parameters max_tokens, min_tokens, ignore_eos, stop_token_ids and
            token_rules count.
        params: how wide to search, and what is best.
        end_token_ids: the model's own.
    Raises:
        ServerError: whatever a sequence failed with. All others are ended then, and when this is cancelled.
    """
    asked = request.params
    ends = asked.stop_token_ids if asked.ignore_eos else asked.stop_token_ids | end_token_ids
    beams = Beams(params, ends, asked.max_tokens, asked.min_tokens)
    first: SequenceOutput | None = None
    while not beams.is_over:
        requests = [_step(request, beam, beams.num_wanted, is_first=first is None) for beam in beams.live]
        outputs = await _run_all(generate, requests)
        first = first or outputs[0]
        beams.advance([output.logprobs[0].top for output in outputs if output.logprobs is not None])
    assert first is not None  # a search takes at least one step
    return BeamResult(tuple(beams.best), first.num_cached_tokens, first.scheduled_time_s)


def _step(request: GenerationRequest, beam: Hypothesis, num_wanted: int, *, is_first: bool) -> GenerationRequest:
    """One token more of a beam: which are likeliest is asked, not which is chosen."""
    params = dataclasses.replace(
        request.params, max_tokens=1, min_tokens=0, temperature=0.0, num_logprobs=num_wanted, num_prompt_logprobs=None
    )
    return dataclasses.replace(
        request,
        prompt_token_ids=[*request.prompt_token_ids, *beam.token_ids],
        params=params,
        # Later steps keep the request's place: at the end of the queue, others would overtake the search at each step.
        submitted_time_s=None if is_first else request.arrival_time_s,
    )


async def _run_all(generate: Generate, requests: Sequence[GenerationRequest]) -> list[SequenceOutput]:
    """The output of each; the first error ends all."""
    tasks = [asyncio.create_task(_run(generate, request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(generate: Generate, request: GenerationRequest) -> SequenceOutput:
    async with aclosing(generate(request)) as outputs:
        async for output in outputs:
            if output.token_ids:
                return output
    raise RuntimeError("a sequence ended without a token")
