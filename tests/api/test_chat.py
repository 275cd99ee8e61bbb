"""Chat completions, whole and in frames."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from engine.errors import ContextLengthExceeded, NonFiniteLogits
from tests.api.conftest import REPLY, Harness, MakeHarness, ids_of, run_async
from tests.api.scripted import fails, says

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
USAGE_DETAILS = {
    "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
        "audio_tokens": 0,
    },
}
_PLAIN = {"index": 0, "logprobs": None, "finish_reason": None}


async def post(
    harness: Harness, body: dict[str, Any], path: str = "/v1/chat/completions", **more: Any
) -> httpx.Response:
    return await harness.client.post(path, json=body, **more)


def frames_of(response: httpx.Response) -> list[Any]:
    """The data of all frames; checks the framing itself."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events.pop() == ""
    assert events[-1] == "data: [DONE]"
    frames = []
    for event in events[:-1]:
        if event == ": ping":
            continue
        assert event.startswith("data: {") and "\n" not in event, event
        frames.append(json.loads(event.removeprefix("data: ")))
    return frames


def test_an_answer_has_every_field_clients_read(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            response = await post(h, HELLO)
            body = response.json()
            assert response.status_code == 200
            assert body["id"].startswith("chatcmpl-") and isinstance(body["created"], int)
            assert body["system_fingerprint"].startswith("fp_") and body["service_tier"] == "default"
            assert (body["object"], body["model"]) == ("chat.completion", "model")
            assert body["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": REPLY, "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ]
            prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            num_prompt = len("user\nHi\nassistant\n") + prompt.count("<|")
            num_generated = len(REPLY.encode()) + 1
            assert body["usage"] == {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_generated,
                "total_tokens": num_prompt + num_generated,
                **USAGE_DETAILS,
            }

    run_async(scenario())


def test_a_stream_has_role_content_finish_usage_and_done_in_this_order(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.step_s = 0.002  # else several tokens arrive as one
            response = await post(h, {**HELLO, "stream": True, "stream_options": {"include_usage": True}})
            assert response.headers["cache-control"] == "no-cache"
            assert response.headers["x-accel-buffering"] == "no"
            role, *content, finish, usage = frames_of(response)
            assert role["choices"] == [
                {
                    "index": 0,
                    "delta": {"role": "assistant", "content": "", "refusal": None},
                    "logprobs": None,
                    "finish_reason": None,
                }
            ]
            # Characters of two and three bytes come whole, though every byte is a token.
            pieces = [frame["choices"][0]["delta"]["content"] for frame in content]
            assert "".join(pieces) == REPLY and all(pieces) and len(pieces) > 1
            assert all(
                frame["choices"][0] == {**_PLAIN, "delta": {"content": p}}
                for frame, p in zip(content, pieces, strict=True)
            )
            assert finish["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
            assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(REPLY.encode()) + 1
            assert all(frame["usage"] is None for frame in (role, *content, finish))
            assert len({(f["id"], f["created"], f["model"], f["object"]) for f in (role, *content, finish, usage)}) == 1
            assert usage["object"] == "chat.completion.chunk"

    run_async(scenario())


def test_no_frame_has_a_usage_key_unless_asked_for(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            frames = frames_of(await post(h, {**HELLO, "stream": True}))
            assert not any("usage" in frame for frame in frames)

    run_async(scenario())


def test_streamed_and_whole_answers_say_the_same(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            asked = {**HELLO, "n": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "stop": ["界"]}
            whole = (await post(h, asked)).json()["choices"]
            frames = frames_of(await post(h, {**asked, "stream": True}))
            for choice in whole:
                mine = [f["choices"][0] for f in frames if f["choices"][0]["index"] == choice["index"]]
                assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["delta"] == {}
                assert (
                    "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"] == "Grüße, 世"
                )
                entries = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
                assert entries == choice["logprobs"]["content"]
                assert [i for c in mine for i in c.get("token_ids", ())] == choice["token_ids"]
                assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"

    run_async(scenario())


def test_logprob_bytes_rejoin_into_the_content(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            choice = (await post(h, {**HELLO, "logprobs": True, "top_logprobs": 2})).json()["choices"][0]
            entries = choice["logprobs"]["content"]
            assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == REPLY
            assert [entry["logprob"] for entry in entries][:2] == [pytest.approx(-0.1), pytest.approx(-0.2)]
            assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(REPLY.encode())
            assert choice["logprobs"]["refusal"] is None

    run_async(scenario())


def test_logprobs_alone_have_no_alternatives(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            choice = (await post(h, {**HELLO, "logprobs": True})).json()["choices"][0]
            assert all(entry["top_logprobs"] == [] for entry in choice["logprobs"]["content"])
            assert h.engine.added[-1].params.num_logprobs == 0

    run_async(scenario())


def test_a_stop_string_ends_the_sequence_in_the_engine_too(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            choice = (await post(h, {**HELLO, "stop": "e, "})).json()["choices"][0]
            assert choice["message"]["content"] == "Grüß" and choice["finish_reason"] == "stop"
            while h.engine.running:
                await _tick()

    run_async(scenario())


def test_max_tokens_ends_with_length_and_the_newer_name_wins(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            body = (await post(h, {**HELLO, "max_tokens": 5, "max_completion_tokens": 2})).json()
            assert body["choices"][0]["finish_reason"] == "length" and body["choices"][0]["message"]["content"] == "Gr"
            assert body["usage"]["completion_tokens"] == 2

    run_async(scenario())


def test_choices_have_seeds_of_their_own_and_the_first_the_requests(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            await post(h, {**HELLO, "seed": 2**64 - 1, "n": 2})
            assert sorted(s.params.seed for s in h.engine.added) == [0, 2**64 - 1]
            h.engine.added.clear()
            await post(h, HELLO)
            await post(h, HELLO)
            assert h.engine.added[0].params.seed != h.engine.added[1].params.seed

    run_async(scenario())


def test_token_ids_are_returned_on_request(harness: MakeHarness, tokenizer: Any) -> None:
    async def scenario() -> None:
        async with harness() as h:
            choice = (await post(h, {**HELLO, "return_token_ids": True})).json()["choices"][0]
            assert choice["token_ids"] == [*ids_of(tokenizer, REPLY), tokenizer.eos_token_id]
            assert choice["prompt_token_ids"] == h.engine.added[0].prompt_token_ids

    run_async(scenario())


def test_metadata_and_tier_come_back_and_priority_reaches_the_engine(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            body = (await post(h, {**HELLO, "metadata": {"a": "b"}, "service_tier": "fast"})).json()
            assert body["metadata"] == {"a": "b"} and body["service_tier"] == "priority"
            await post(h, {**HELLO, "service_tier": "flex"})
            await post(h, {**HELLO, "priority": 7})
            fast, flex, seven = (sequence.priority for sequence in h.engine.added)
            assert fast < 0 < flex and seven == 7

    run_async(scenario())


def test_keys_keep_prefix_caches_apart(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness(api_key=("one", "two")) as h:
            for key in ("one", "two", "one"):
                await post(h, HELLO, headers={"authorization": f"Bearer {key}"})
            salts = [sequence.cache_salt for sequence in h.engine.added]
            assert salts[0] == salts[2] != salts[1] and len(salts[0]) == 32

    run_async(scenario())


def test_an_error_before_the_first_token_has_a_status_of_its_own(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.refusal = ContextLengthExceeded("needs 9 blocks of 4")
            for stream in (True, False):
                response = await post(h, {**HELLO, "stream": stream})
                assert response.status_code == 400
                assert response.json()["error"]["code"] == "context_length_exceeded"

    run_async(scenario())


def test_an_error_after_the_200_is_a_frame_followed_by_done(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = fails(NonFiniteLogits("NaN in row 3 \n\n data: x"), after=[65])
            response = await post(h, {**HELLO, "stream": True})
            assert response.status_code == 200
            *_, last = frames_of(response)
            assert last == {
                "error": {
                    "message": "NaN in row 3 \n\n data: x",
                    "type": "server_error",
                    "param": None,
                    "code": "server_error",
                }
            }
            response = await post(h, HELLO)
            assert response.status_code == 500 and response.headers["x-should-retry"] == "false"

    run_async(scenario())


def test_one_failing_choice_ends_all_of_the_request(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            good, bad = says([65] * 400, None), fails(NonFiniteLogits("NaN"), after=[66])
            h.engine.script = lambda sequence: (bad if sequence.params.seed == 1 else good)(sequence)
            response = await post(h, {**HELLO, "n": 3, "seed": 0})
            assert response.status_code == 500
            while h.engine.running:
                await _tick()

    run_async(scenario())


async def _tick() -> None:
    import asyncio

    await asyncio.sleep(0.005)
