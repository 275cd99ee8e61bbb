"""Every error has OpenAI's body, and headers that tell clients whether to come back."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from api.errors import InvalidKey, WrongFamily, wire_error
from audio.errors import AudioError, AudioTooLong
from engine import errors
from tests.api.conftest import MakeHarness, run_async
from tests.api.test_chat import HELLO, post
from text.errors import PromptError, PromptTooLong

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and response.headers["x-request-id"] and response.headers["openai-processing-ms"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("error", "status", "code", "should_retry"),
    [
        (errors.InvalidValue("x", param="n"), 400, "invalid_request_error", False),
        (errors.UnsupportedParameter("x"), 400, "unsupported_parameter", False),
        (errors.ContextLengthExceeded("x"), 400, "context_length_exceeded", False),
        (PromptError("x", "messages"), 400, "invalid_request_error", False),
        (PromptTooLong("x", "messages", min_num_tokens=9), 400, "context_length_exceeded", False),
        (InvalidKey("x"), 401, "invalid_api_key", False),
        (WrongFamily("x", param="model"), 404, "unsupported_model", False),
        (AudioError("x"), 400, "invalid_request_error", False),
        (AudioTooLong(8), 413, "audio_too_long", False),
        (errors.QueueFull("x", retry_after_s=2.5), 429, "rate_limit_exceeded", True),
        (errors.QueueTimeout("x"), 503, "overloaded", True),
        (errors.RequestTimeout("x"), 503, "request_timeout", False),
        (errors.NotServing("x"), 503, "unavailable", True),
        (errors.NonFiniteLogits("x"), 500, "server_error", False),
        (errors.StepFailed("x"), 500, "server_error", False),
        (errors.EngineDead("x"), 500, "server_error", False),
        (ZeroDivisionError("secret"), 500, "server_error", False),
    ],
)
def test_each_error_has_its_status_code_and_advice(
    error: Exception, status: int, code: str, should_retry: bool
) -> None:
    wire = wire_error(error)
    assert (wire.status, wire.body["code"]) == (status, code)
    assert wire.headers["x-should-retry"] == str(should_retry).lower()
    assert ("retry-after" in wire.headers) == should_retry
    assert "secret" not in wire.json.decode()


def test_retry_after_is_whole_seconds_and_exact_milliseconds() -> None:
    headers = wire_error(errors.QueueFull("x", retry_after_s=2.5)).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2500")
    headers = wire_error(errors.QueueFull("x", retry_after_s=0.0)).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "1")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000, b'{"n": ' + b"9" * 10_000 + b"}", b'{"messages": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"messages": ' + json.dumps([{"role": 1}] * 100_000).encode() + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_request_are_400_with_a_short_message(harness: MakeHarness, content: bytes) -> None:
    async def scenario() -> None:
        async with harness() as h:
            response = await h.client.post(CHAT, content=content, headers=JSON)
            assert response.status_code == 400
            assert len(error_of(response)["message"]) < 400

    run_async(scenario())


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_bodies_that_browsers_send_unasked_are_415(harness: MakeHarness, content_type: str | None) -> None:
    async def scenario() -> None:
        async with harness() as h:
            headers = {} if content_type is None else {"content-type": content_type}
            response = await h.client.post(CHAT, content=json.dumps(HELLO).encode(), headers=headers)
            assert response.status_code == 415 and error_of(response)

    run_async(scenario())


def test_unknown_paths_methods_and_models_have_the_same_body(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            response = await h.client.get("/v1/nothing")
            assert response.status_code == 404 and error_of(response)["code"] == "not_found"
            response = await h.client.get(CHAT)
            assert response.status_code == 405 and error_of(response)["code"] == "method_not_allowed"
            assert "POST" in response.headers["allow"]
            response = await post(h, {**HELLO, "model": "gpt-4"})
            error = error_of(response)
            assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
            assert "org/tiny" in error["message"]
            response = await h.client.get("/v1/models/gpt-4")
            assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"

    run_async(scenario())


def test_a_bug_is_a_500_that_shows_nothing_and_the_server_lives(
    harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with harness() as h:
            monkeypatch.setattr(h.manager.prompts, "encode_chat", lambda *_, **__: 1 / 0)
            response = await post(h, HELLO, headers={"x-request-id": "mine"})
            assert response.status_code == 500 and response.headers["x-request-id"] == "mine"
            assert "division" not in error_of(response)["message"]
            assert response.headers["x-should-retry"] == "false"
            assert (await h.client.get("/health")).status_code == 200
            assert h.manager.num_admitted == 0

    run_async(scenario())


def test_full_servers_say_429_and_when_to_come_back(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness(max_concurrent=1) as h:
            with h.manager.admission():
                response = await post(h, HELLO)
            assert response.status_code == 429 and error_of(response)["code"] == "rate_limit_exceeded"
            assert int(response.headers["retry-after"]) >= 1 and int(response.headers["retry-after-ms"]) >= 1
            assert response.headers["x-should-retry"] == "true"
            assert not h.engine.added

    run_async(scenario())


def test_loading_and_draining_servers_say_503_to_requests(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            await h.manager.drain(0)
            response = await post(h, HELLO)
            assert response.status_code == 503 and error_of(response)["code"] == "unavailable"
            assert response.headers["x-should-retry"] == "true"

    run_async(scenario())


def test_requests_that_run_too_long_are_503(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness(request_timeout=0.2) as h:
            h.engine.may_step.clear()
            response = await post(h, HELLO)
            assert response.status_code == 503 and error_of(response)["code"] == "request_timeout"
            assert h.manager.num_admitted == 0

    run_async(scenario())


def test_an_engines_death_answers_everyone(harness: MakeHarness) -> None:
    async def scenario() -> None:
        import asyncio

        async with harness() as h:
            h.engine.may_step.clear()
            waiting = [asyncio.create_task(post(h, {**HELLO, "stream": stream})) for stream in (True, False)]
            while len(h.engine.running) != 2:
                await asyncio.sleep(0.01)
            h.engine.death = RuntimeError("out of memory")
            for response in await asyncio.gather(*waiting):
                assert response.status_code == 500 and "stopped" in error_of(response)["message"]
            response = await h.client.get("/health")
            assert response.status_code == 503 and response.json()["status"] == "dead"
            assert (await post(h, HELLO)).status_code == 500

    run_async(scenario())
