"""Bounds and defaults of every sampling field, as requests meet them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.params import chat_plan, completion_plan
from engine.errors import CallerError, ContextLengthExceeded
from models import ChatCompletionRequest, CompletionRequest
from tests.api.conftest import MakeHarness, run_async
from tests.api.test_chat import HELLO, post

VOCAB = 100


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({**HELLO, **fields})


def test_defaults_are_openais_and_not_the_checkpoints() -> None:
    params = chat_plan(chat(), VOCAB).params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)


def test_every_field_reaches_the_engine() -> None:
    plan = chat_plan(
        chat(
            temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, frequency_penalty=1.5, presence_penalty=-1,
            repetition_penalty=1.2, logit_bias={"3": -100, "99": 5}, min_tokens=2, ignore_eos=True, stop_token_ids=[4],
            seed=-5, n=3, stop=["a", "b"], max_tokens=9, logprobs=True, top_logprobs=4, truncate=8,
        ),
        VOCAB,
    )  # fmt: skip
    params = plan.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (1.5, -1.0, 1.2)
    assert params.logit_bias == ((3, -100.0), (99, 5.0)) and params.stop_token_ids == {4}
    assert (params.min_tokens, params.ignore_eos, params.num_logprobs) == (2, True, 4)
    assert (plan.seed, plan.num_choices, plan.stop, plan.max_tokens, plan.truncate) == (-5, 3, ("a", "b"), 9, 8)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": float("-inf")}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"100": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1_0": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "a" * 1000}, "stop"),
        ({"stop_token_ids": [100]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 1000}, "stop_token_ids"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"priority": 10**6}, "priority"),
        ({"truncate": 0}, "truncate"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(CallerError) as caught:
        chat_plan(chat(**fields), VOCAB)
    assert caught.value.param == param
    assert param in caught.value.message and len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"n": True}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": "2"}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"logit_bias": {"1": True}}, "logit_bias.1"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", None]}, "stop[1]"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"stream": "yes"}, "stream"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"chat_template_kwargs": {"messages": []}}, None),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"temperature": float("nan")}, "temperature"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata." + "k" * 65),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ],
)
def test_wrong_shapes_are_400_and_name_the_field(
    harness: MakeHarness, fields: dict[str, Any], param: str | None
) -> None:
    async def scenario() -> None:
        async with harness() as h:
            content = json.dumps({**HELLO, **fields})
            headers = {"content-type": "application/json"}
            response = await h.client.post("/v1/chat/completions", content=content, headers=headers)
            error = response.json()["error"]
            assert response.status_code == 400, error
            assert error["type"] == "invalid_request_error" and error["message"]
            if param is not None:
                assert error["param"] == param

    run_async(scenario())


def test_null_is_the_same_as_absent(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            names = set(ChatCompletionRequest.model_fields) - {"messages", "model"}
            names |= {"tools", "tool_choice", "functions", "response_format", "audio", "modalities", "store"}
            response = await post(h, {**HELLO, **dict.fromkeys(names)})
            assert response.status_code == 200 and "x-ignored-parameters" not in response.headers
            assert h.engine.added[0].params.temperature == 1.0

    run_async(scenario())


def test_temperature_zero_is_greedy_and_top_p_zero_the_likeliest() -> None:
    assert chat_plan(chat(temperature=0), VOCAB).params.temperature == 0.0
    assert chat_plan(chat(temperature=1e-30), VOCAB).params.temperature == 0.0
    params = chat_plan(chat(top_p=0), VOCAB).params
    assert (params.top_p, params.top_k) == (1.0, 1)


@pytest.mark.parametrize("top_k", [-1, 0, 100, 10**30])
def test_a_top_k_that_keeps_everything_is_off(top_k: int) -> None:
    assert chat_plan(chat(top_k=top_k), VOCAB).params.top_k == 0


def test_chat_runs_to_the_end_of_the_context_unless_told_otherwise() -> None:
    assert chat_plan(chat(), VOCAB).for_prompt(40, 100, "messages").max_tokens == 60
    assert chat_plan(chat(max_tokens=7), VOCAB).for_prompt(40, 100, "messages").max_tokens == 7


@pytest.mark.parametrize(("fields", "num_prompt"), [({}, 100), ({"max_tokens": 61}, 40), ({"min_tokens": 61}, 40)])
def test_what_does_not_fit_the_context_is_refused_with_both_numbers(fields: dict[str, Any], num_prompt: int) -> None:
    with pytest.raises(ContextLengthExceeded, match=rf"\b{num_prompt} tokens.*\b100 tokens"):
        chat_plan(chat(**fields), VOCAB).for_prompt(num_prompt, 100, "messages")


def test_completions_take_up_to_five_logprobs() -> None:
    with pytest.raises(CallerError, match="logprobs is 6: it must be from 0 to 5"):
        completion_plan(CompletionRequest(prompt="a", logprobs=6), VOCAB)
    assert completion_plan(CompletionRequest(prompt="a", logprobs=5), VOCAB).params.num_prompt_logprobs is None
    assert completion_plan(CompletionRequest(prompt="a", logprobs=5, echo=True), VOCAB).params.num_prompt_logprobs == 5


@pytest.mark.parametrize(
    "prompt", [[], [[]], "", [""], [[1], []], ["a", 1], [1, "a"], [1, True], [10**6], [-1], [[10**6]], None, {}, [None]]
)
def test_prompts_that_are_none_are_400(harness: MakeHarness, prompt: Any) -> None:
    async def scenario() -> None:
        async with harness() as h:
            response = await post(h, {"prompt": prompt}, "/v1/completions")
            assert response.status_code == 400 and response.json()["error"]["param"].startswith("prompt")
            assert not h.engine.added

    run_async(scenario())


def test_too_many_choices_over_all_prompts_are_refused(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            response = await post(h, {"prompt": ["a"] * 9, "n": 128}, "/v1/completions")
            assert response.status_code == 400 and "1024" in response.json()["error"]["message"]

    run_async(scenario())


@pytest.mark.parametrize("length", [600, 100_000, 3_000_000])
def test_prompts_beyond_the_context_are_refused_whatever_their_size(harness: MakeHarness, length: int) -> None:
    async def scenario() -> None:
        async with harness() as h:
            for path, body in (
                ("/v1/completions", {"prompt": "a" * length}),
                ("/v1/completions", {"prompt": [65] * length}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * length}]}),
            ):
                response = await post(h, body, path)
                error = response.json()["error"]
                assert (response.status_code, error["code"]) == (400, "context_length_exceeded"), error
                assert "512" in error["message"]
            assert not h.engine.added

    run_async(scenario())


def test_parts_no_text_model_can_read_are_unsupported(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
            message = {"role": "user", "content": [{"type": "text", "text": "x"}, part]}
            error = (await post(h, {"messages": [message]})).json()["error"]
            assert error["code"] == "unsupported_parameter" and error["param"] == "messages[0].content[1]"

    run_async(scenario())


def test_template_kwargs_reach_the_template(harness: MakeHarness, tokenizer: Any) -> None:
    async def scenario() -> None:
        tokenizer.chat_template = "{{ messages[0].content }}|{{ reasoning_effort }}|{{ verbosity }}|{{ colour }}"
        async with harness() as h:
            fields = {"reasoning_effort": "low", "verbosity": "high", "chat_template_kwargs": {"colour": "red"}}
            response = await post(h, {**HELLO, **fields})
            assert response.status_code == 200
            assert tokenizer.decode(h.engine.added[0].prompt_token_ids) == "Hi|low|high|red"

    saved = tokenizer.chat_template
    try:
        run_async(scenario())
    finally:
        tokenizer.chat_template = saved
