"""Beam search over HTTP: its fields, what they cannot go with, and answers that come whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from engine.errors import RequestTimeout
from engine.sequence import Sequence, SequenceOutput, TokenLogprobs
from tests.api.conftest import MakeHarness, run_async
from tests.api.scripted import Script, fails
from tests.api.test_chat import frames_of, post

PATH = "/v1/completions"
EOS = 258
# Continuations by the last token: after "a" (64 in this vocabulary) come "b" or "c", and so on; the rest is unlikely.
LIKELY = {64: {65: -0.6, 66: -1.3}, 65: {EOS: -0.2, 67: -2.0}, 66: {67: -0.1}, 67: {EOS: -0.1}}


def follows() -> Script:
    """Says what follows the last token, and the likeliest others."""

    def script(sequence: Sequence) -> Iterator[SequenceOutput]:
        known = LIKELY.get(sequence.prompt_token_ids[-1], {})
        rest = {token_id: -9.0 - 0.01 * token_id for token_id in range(100, 200)}
        ranked = sorted({**known, **rest}.items(), key=lambda pair: -pair[1])
        top = tuple(ranked[: sequence.params.num_logprobs])
        yield SequenceOutput(
            sequence.sequence_id,
            (top[0][0],),
            logprobs=(TokenLogprobs(top[0][1], top),),
            finish_reason="length",
            num_cached_tokens=1,
            scheduled_time_s=sequence.arrival_time_s,
        )

    return script


def test_the_best_choices_are_given_best_first(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = follows()
            fields = {"prompt": [64], "max_tokens": 8, "num_beams": 3, "return_token_ids": True}
            body = (await post(h, {**fields, "n": 2}, PATH)).json()
            # "b" costs 0.8 over two tokens, "cd" 1.5 over three: the mean decides.
            assert [choice["text"] for choice in body["choices"]] == ["b", "cd"]
            assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "stop"]
            assert [choice["index"] for choice in body["choices"]] == [0, 1]
            assert body["usage"]["prompt_tokens"] == 1
            assert body["usage"]["completion_tokens"] == 2 + 3
            assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
            body = (await post(h, {**fields, "length_penalty": -1}, PATH)).json()
            assert [choice["text"] for choice in body["choices"]] == ["b"]
            body = (await post(h, {**fields, "length_penalty": 3}, PATH)).json()
            assert len(body["choices"][0]["token_ids"]) >= 3
            assert max(sequence.params.max_tokens for sequence in h.engine.added) == 1

    run_async(scenario())


def test_a_choice_may_end_at_max_tokens_or_at_a_stop_string(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = follows()
            body = (await post(h, {"prompt": [64], "max_tokens": 1, "num_beams": 2, "n": 2}, PATH)).json()
            assert [(choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [
                ("b", "length"),
                ("c", "length"),
            ]
            fields = {"prompt": [64], "max_tokens": 8, "num_beams": 2, "n": 2, "stop": "d"}
            body = (await post(h, fields, PATH)).json()
            assert sorted(choice["text"] for choice in body["choices"]) == ["b", "c"]

    run_async(scenario())


def test_a_stream_sends_each_choice_whole(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = follows()
            fields: dict[str, Any] = {"num_beams": 3, "n": 2, "max_tokens": 8}
            whole = (await post(h, {"prompt": [[64], [66]], **fields}, PATH)).json()
            frames = frames_of(await post(h, {"prompt": [[64], [66]], **fields, "stream": True}, PATH))
            texts = {frame["choices"][0]["index"]: "" for frame in frames if frame["choices"]}
            with_text = [frame["choices"][0] for frame in frames if frame["choices"] and frame["choices"][0]["text"]]
            for choice in with_text:
                texts[choice["index"]] += choice["text"]
            assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}
            assert len({choice["index"] for choice in with_text}) == len(with_text) == 4

    run_async(scenario())


def test_chat_takes_the_fields_too(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = follows()
            message = {"role": "user", "content": "a"}
            fields = {"messages": [message], "num_beams": 2, "n": 2, "max_tokens": 2, "early_stopping": "never"}
            body = (await post(h, fields)).json()
            assert [choice["index"] for choice in body["choices"]] == [0, 1]
            assert all(choice["finish_reason"] == "length" for choice in body["choices"])
            assert "x-ignored-parameters" not in (await post(h, fields)).headers

    run_async(scenario())


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"num_beams": 0}, "num_beams", "num_beams is 0: it must be from 1 to 10"),
        ({"num_beams": 11}, "num_beams", "from 1 to 10"),
        ({"num_beams": True}, "num_beams", "num_beams"),
        ({"num_beams": 2, "n": 3}, "n", "n is 3: it must not exceed num_beams (2)"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature", "temperature is 0.5: it cannot go with beam search"),
        ({"num_beams": 2, "frequency_penalty": 1}, "frequency_penalty", "cannot go with beam search"),
        ({"num_beams": 2, "presence_penalty": 1}, "presence_penalty", "cannot go with beam search"),
        ({"num_beams": 2, "repetition_penalty": 1.2}, "repetition_penalty", "cannot go with beam search"),
        ({"num_beams": 2, "logit_bias": {"5": 1}}, "logit_bias", "cannot go with beam search"),
        ({"num_beams": 2, "logprobs": 0}, "logprobs", "cannot go with beam search"),
        ({"num_beams": 2, "length_penalty": 11}, "length_penalty", "from -10 to 10"),
        ({"num_beams": 2, "early_stopping": "later"}, "early_stopping", "early_stopping"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping", "early_stopping"),
        ({"length_penalty": 2}, "length_penalty", "length_penalty is 2.0: it needs num_beams of at least 2"),
        ({"num_beams": 1, "early_stopping": True}, "early_stopping", "needs num_beams of at least 2"),
        ({"num_beams": 2, "echo": True, "max_tokens": 0}, "max_tokens", "at least 1 with num_beams above 1"),
        ({"num_beams": 10, "prompt": [[1]] * 103}, "prompt", "at most 1024"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    harness: MakeHarness, fields: dict[str, Any], param: str, part: str
) -> None:
    async def scenario() -> None:
        async with harness() as h:
            answer = await post(h, {"prompt": "Hi", **fields}, PATH)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == param and part in error["message"], error
            assert h.engine.added == []

    run_async(scenario())


def test_neutral_values_go_with_beams(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = follows()
            neutral = {"temperature": 0, "frequency_penalty": 0, "repetition_penalty": 1, "logit_bias": {}, "seed": 4}
            answer = await post(h, {"prompt": [64], "num_beams": 2, "max_tokens": 3, **neutral}, PATH)
            assert answer.status_code == 200
            plain = await post(h, {"prompt": [64], "num_beams": 1, "max_tokens": 1, "temperature": 0}, PATH)
            assert plain.status_code == 200 and h.engine.added[-1].params.num_logprobs is None

    run_async(scenario())


def test_a_failing_beam_has_its_own_status(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = fails(RequestTimeout("too long"))
            answer = await post(h, {"prompt": [64], "num_beams": 2}, PATH)
            assert answer.status_code == 503

    run_async(scenario())


def test_a_caller_who_goes_ends_the_search(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = follows()
            h.engine.may_step.clear()
            asking = asyncio.create_task(post(h, {"prompt": [64], "num_beams": 2, "max_tokens": 9}, PATH))
            while not h.engine.added:
                await asyncio.sleep(0.005)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            h.engine.may_step.set()
            while h.engine.running:
                await asyncio.sleep(0.005)
            assert len(h.engine.added) == 1

    run_async(scenario())
