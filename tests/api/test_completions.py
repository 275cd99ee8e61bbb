"""Text completions: prompts in their four forms, echo, logprobs, streamed or not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import REPLY, MakeHarness, ids_of, run_async
from tests.api.scripted import says
from tests.api.test_chat import frames_of, post

PATH = "/v1/completions"


def test_an_answer_has_every_field_clients_read(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            body = (await post(h, {"model": "org/tiny", "prompt": "Hi", "max_tokens": 99}, PATH)).json()
            assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
            assert body["model"] == "org/tiny"
            assert body["choices"] == [{"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop"}]
            assert body["usage"]["prompt_tokens"] == 2

    run_async(scenario())


def test_the_default_is_sixteen_tokens_and_never_beyond_the_context(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = says([65] * 600, None)
            body = (await post(h, {"prompt": "Hi"}, PATH)).json()
            assert body["usage"]["completion_tokens"] == 16 and body["choices"][0]["finish_reason"] == "length"
            body = (await post(h, {"prompt": [65] * 505}, PATH)).json()
            assert body["usage"]["completion_tokens"] == 512 - 505

    run_async(scenario())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [[39, 72]]),
        (["H", "Hi"], [[39], [39, 72]]),
        ([39, 72], [[39, 72]]),
        ([[39], [72, 72]], [[39], [72, 72]]),
    ],
)
def test_a_prompt_has_four_forms(harness: MakeHarness, prompt: Any, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with harness() as h:
            body = (await post(h, {"prompt": prompt, "return_token_ids": True}, PATH)).json()
            assert [choice["prompt_token_ids"] for choice in body["choices"]] == expected

    run_async(scenario())


def test_choices_are_numbered_across_prompts_and_each_prompt_counts_once(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            asked = {"prompt": ["ab", "cde"], "n": 2, "return_token_ids": True, "echo": True, "max_tokens": 2}
            body = (await post(h, asked, PATH)).json()
            assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
            assert [choice["text"] for choice in body["choices"]] == ["abGr", "abGr", "cdeGr", "cdeGr"]
            assert [len(choice["prompt_token_ids"]) for choice in body["choices"]] == [2, 2, 3, 3]
            assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 8)
            assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 4

    run_async(scenario())


def test_a_stream_adds_up_to_the_whole_answer(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            asked = {"prompt": ["ab", "c"], "echo": True, "logprobs": 1, "return_token_ids": True, "max_tokens": 9}
            whole = (await post(h, asked, PATH)).json()["choices"]
            stream = {**asked, "stream": True, "stream_options": {"include_usage": True}}
            *frames, usage = frames_of(await post(h, stream, PATH))
            assert usage["choices"] == [] and usage["usage"]["prompt_tokens"] == 3
            for choice in whole:
                mine = [f["choices"][0] for f in frames if f["choices"][0]["index"] == choice["index"]]
                assert "".join(part["text"] for part in mine) == choice["text"]
                assert [part["finish_reason"] for part in mine[:-1]] == [None] * (len(mine) - 1)
                assert mine[-1]["finish_reason"] == choice["finish_reason"] == "length"
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    parts = [entry for part in mine if part["logprobs"] for entry in part["logprobs"][name]]
                    assert parts == choice["logprobs"][name]
                assert [i for part in mine for i in part["token_ids"]] == choice["token_ids"]

    run_async(scenario())


def test_echo_with_logprobs_scores_the_prompt_and_starts_with_null(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            asked = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 2}
            logprobs = (await post(h, asked, PATH)).json()["choices"][0]["logprobs"]
            assert logprobs["tokens"] == ["a", "b", "c", "G", "r"]
            assert logprobs["token_logprobs"] == [None, -0.5, -0.5, pytest.approx(-0.1), pytest.approx(-0.2)]
            assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][1] == {"b": -0.5}
            assert logprobs["text_offset"] == [0, 1, 2, 3, 4]

    run_async(scenario())


def test_a_prompt_can_be_scored_without_generating(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            asked = {"prompt": "abc", "echo": True, "max_tokens": 0}
            choice = (await post(h, {**asked, "logprobs": 0}, PATH)).json()["choices"][0]
            assert choice["text"] == "abc" and choice["finish_reason"] == "length"
            assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
            assert (await post(h, asked, PATH)).json()["choices"][0]["text"] == "abc"
            refused = await post(h, {"prompt": "abc", "max_tokens": 0}, PATH)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"

    run_async(scenario())


def test_offsets_of_tokens_within_a_character_are_the_characters(harness: MakeHarness, tokenizer: Any) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = says(ids_of(tokenizer, "aü世b"), None)
            logprobs = (await post(h, {"prompt": "xy", "logprobs": 0}, PATH)).json()["choices"][0]["logprobs"]
            assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 3]
            assert logprobs["tokens"][1].startswith("bytes:")

    run_async(scenario())


def test_truncate_keeps_the_last_tokens_and_echo_shows_them(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            body = (await post(h, {"prompt": "abcdef", "truncate": 2, "echo": True, "max_tokens": 1}, PATH)).json()
            assert body["choices"][0]["text"] == "efG" and body["usage"]["prompt_tokens"] == 2

    run_async(scenario())
