"""Runs the sequences of one request and turns what the engine makes of them into text, choice by choice.

Knows nothing of HTTP, of chat or text completions, or of how either is framed.
Called by api/chat.py and api/completions.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Series
from contextlib import aclosing
from dataclasses import dataclass, field

from api.beams import beam_deltas
from api.metrics import Metrics
from engine.sequence import FinishReason, SequenceOutput, TokenLogprobs
from model_manager import GenerationRequest, ModelManager
from runtime.beams import BeamParams
from text.output import TextOutput


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One generated token and its logprobs."""

    token_id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What came new for one choice.

    Args:
        index: of the choice in the answer.
        text: new text, maybe none.
        token_ids: new tokens; their text may come later.
        entries: logprobs of the tokens whose text is in `text`.
        prompt_logprobs: with the first delta only, when asked for; one entry a prompt token, the first is None.
        finish_reason: set on the last delta of the choice.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    entries: tuple[TokenEntry, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None


class Choice:
    """One sequence of a request on its way to text.

    Args:
        index: of the choice in the answer.
        request: what to run.
        text: its detokenizer and stop strings.
        metrics: hears of times and tokens.
        beams: how it is searched for, together with the other choices of its prompt; None for by itself.
    """

    __slots__ = (
        "_first_s", "_last_s", "_metrics", "_num_released", "_pending", "_scheduled_s", "_text",
        "beams", "index", "num_cached_tokens", "num_tokens", "request",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        text: TextOutput,
        metrics: Metrics,
        beams: BeamParams | None = None,
    ) -> None:
        self.index = index
        self.request = request
        self.beams = beams
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._text = text
        self._metrics = metrics
        self._pending: list[TokenEntry] = []
        self._num_released = 0
        self._scheduled_s: float | None = None
        self._first_s: float | None = None
        self._last_s = 0.0

    async def deltas(self, manager: ModelManager) -> AsyncGenerator[ChoiceDelta, None]:
        """Runs it; closing the generator ends the sequence at once, and so does a stop string."""
        async with aclosing(manager.generate(self.request)) as outputs:
            async for output in outputs:
                delta = self.advance(output)
                yield delta
                if delta.finish_reason is not None:
                    return

    def advance(self, output: SequenceOutput) -> ChoiceDelta:
        """What an output makes of it."""
        self._keep_time(output)
        ids = output.token_ids
        self.num_cached_tokens = output.num_cached_tokens
        is_last = output.finish_reason is not None
        has_end_token = output.stop_token_id is not None
        delta = self._text.push(ids, is_last=is_last, drop_last_token=has_end_token)
        finish_reason = output.finish_reason
        if delta.stop_string is not None:
            # Outputs may arrive merged: what was made after the stop string is no part of the answer, whenever it came.
            finish_reason = "stop"
            ids = ids[: len(ids) - delta.num_surplus - has_end_token]
            has_end_token = False
        self.num_tokens += len(ids)
        entries: tuple[TokenEntry, ...] = ()
        if output.logprobs is not None:
            # The token that ended the sequence is not text, and neither are the tokens of a stop string.
            shown = ids[:-1] if has_end_token else ids
            self._pending += map(TokenEntry, shown, output.logprobs)
            entries = self._release(delta.num_tokens)
        if finish_reason is not None:
            self._metrics.on_finished(
                finish_reason, self.request.arrival_time_s, self._scheduled_s, self._first_s, self._last_s
            )
        return ChoiceDelta(self.index, delta.text, ids, entries, output.prompt_logprobs, finish_reason)

    def _release(self, num_out: int) -> tuple[TokenEntry, ...]:
        """The logprobs of tokens whose text has just gone out, for a total of `num_out` since the start."""
        count = num_out - self._num_released
        entries = tuple(self._pending[:count])
        del self._pending[:count]
        self._num_released = num_out
        return entries

    def _keep_time(self, output: SequenceOutput) -> None:
        now = time.monotonic()
        if self._first_s is None:
            self._first_s = now
            self._scheduled_s = output.scheduled_time_s
            self._metrics.on_first_output(self.request, output, now)
        else:
            self._metrics.on_output(len(output.token_ids), now - self._last_s)
        self._last_s = now


async def run(manager: ModelManager, choices: Series[Choice]) -> AsyncGenerator[ChoiceDelta, None]:
    """The deltas of all choices as they come; the first error of any ends all.

    Closing it ends every sequence that is still running. A slow reader makes the manager merge outputs: whatever waits
    here is bounded by one delta a choice.
    """
    runs = _runs(manager, choices)
    if len(runs) == 1:
        async with aclosing(runs[0]) as deltas:
            async for delta in deltas:
                yield delta
        return
    waiting: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue(maxsize=len(runs))
    pumps = [asyncio.create_task(_pump(deltas, waiting)) for deltas in runs]
    try:
        num_running = len(pumps)
        while num_running:
            news = await waiting.get()
            if news is None:
                num_running -= 1
            elif isinstance(news, Exception):
                raise news
            else:
                yield news
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _runs(manager: ModelManager, choices: Series[Choice]) -> list[AsyncGenerator[ChoiceDelta, None]]:
    """The deltas of each choice, or of each prompt's choices where they are found together."""
    runs = []
    waiting = list(choices)
    while waiting:
        first = waiting[0]
        num_together = 1 if first.beams is None else first.beams.num_return_sequences
        together, waiting = waiting[:num_together], waiting[num_together:]
        runs.append(first.deltas(manager) if first.beams is None else beam_deltas(manager, together, first.beams))
    return runs


async def _pump(
    deltas: AsyncGenerator[ChoiceDelta, None], waiting: asyncio.Queue[ChoiceDelta | Exception | None]
) -> None:
    async with aclosing(deltas):
        try:
            async for delta in deltas:
                await waiting.put(delta)
        except Exception as error:  # raised again by whoever reads
            await waiting.put(error)
        else:
            await waiting.put(None)


@dataclass(slots=True)
class FoldedChoice:
    """All deltas of one choice, as one."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Takes the next delta."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.entries += delta.entries
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason = delta.finish_reason

    def as_delta(self, index: int) -> ChoiceDelta:
        """The whole choice, in the form its parts came in."""
        return ChoiceDelta(
            index,
            "".join(self.texts),
            tuple(self.token_ids),
            tuple(self.entries),
            self.prompt_logprobs,
            self.finish_reason,
        )


async def fold(deltas: AsyncGenerator[ChoiceDelta, None], num_choices: int) -> list[ChoiceDelta]:
    """Each choice as one delta: an answer that is not streamed is the sum of one that is."""
    folded = [FoldedChoice() for _ in range(num_choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            folded[delta.index].add(delta)
    return [choice.as_delta(index) for index, choice in enumerate(folded)]


def usage(choices: Series[Choice], num_choices: int) -> dict[str, object]:
    """Token counts of a request; a prompt counts once, however many choices it has.

    Args:
        choices: all of the request.
        num_choices: per prompt.
    """
    firsts = choices[::num_choices]
    num_prompt = sum(len(choice.request.input_token_ids) for choice in firsts)
    num_generated = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(choice.num_cached_tokens for choice in firsts),
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
            "audio_tokens": 0,
        },
    }
