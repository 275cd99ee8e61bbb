"""The openai package against a real server process: sync and async, streamed and not, every frame."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.serving_tiny import save_tiny

ROOT = Path(__file__).parent.parent.parent
START_S = 120


@pytest.fixture(scope="module")
def base_url(checkpoints: Path) -> Iterator[str]:
    """A server started as a user starts it; ends with exit code 0 at SIGTERM."""
    command = [sys.executable, "main.py", "--hf-model", str(save_tiny("qwen3", checkpoints)), "--host", "127.0.0.1"]
    command += ["--port", "0", "--torch-dtype", "float32", "--served-model-name", "org/tiny", "--api-key", "sk-right"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: list[str] = []
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        url = None
        for line in process.stderr:
            lines.append(line)
            found = re.search(r"ready: .*(http://\S+/v1)", line)
            if found:
                url = found[1]
                break
        watchdog.cancel()
        assert url, "".join(lines)
        for word in ("org/tiny", "Qwen3ForCausalLM", "float32", "cpu", "lane flat", "KV"):
            assert word in lines[-1]
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        reader.join()


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="sk-right", max_retries=0) as made:
        yield made


MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界"}]


def _frames(base_url: str, path: str, body: dict[str, Any]) -> list[Any]:
    """Every frame of a stream, raw; `[DONE]` last, as a string."""
    headers = {"authorization": "Bearer sk-right"}
    with httpx.stream("POST", f"{base_url}/{path}", json=body, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        text = answer.read().decode()
    data = [part.removeprefix("data: ") for part in re.split(r"\r?\n\r?\n", text) if part.startswith("data: ")]
    return [part if part == "[DONE]" else json.loads(part) for part in data]


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "org/tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    pieces = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None and whole.usage.completion_tokens == 40
    assert pieces[-1].usage is not None and pieces[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.choices[0].finish_reason == "length"


def test_every_frame_of_a_stream_is_as_documented(base_url: str) -> None:
    body = {"model": "org/tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 3, "stream": True, "n": 2}
    frames = _frames(base_url, "chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert frames[-1] == "[DONE]"
    *chunks, usage = frames[:-1]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] <= 24
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in frames[:-1]} == {
        (usage["id"], usage["created"], "org/tiny", "chat.completion.chunk")
    }
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert own[-1]["delta"] == {} and own[-1]["finish_reason"] == "length"
        assert all(choice["finish_reason"] is None for choice in own[:-1])
        assert all(set(choice["delta"]) == {"content"} for choice in own[1:-1])
    without = _frames(base_url, "chat/completions", body)
    assert all("usage" not in chunk for chunk in without[:-1])


def test_logprobs_belong_to_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="org/tiny", messages=MESSAGES, max_tokens=20, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs
    assert content is not None and content.content is not None and len(content.content) == 20
    raw = b"".join(bytes(token.bytes or []) for token in content.content)
    assert raw.decode(errors="replace") == answer.choices[0].message.content
    for token in content.content:
        assert token.logprob == token.top_logprobs[0].logprob  # greedy: the chosen one is the likeliest
        assert len(token.top_logprobs) == 3


def test_completions_echo_stop_and_several_prompts(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "org/tiny", "max_tokens": 16, "temperature": 0}
    plain = client.completions.create(prompt=["one", "two"], **fields)
    assert [choice.index for choice in plain.choices] == [0, 1]
    echoed = client.completions.create(prompt="one", echo=True, logprobs=1, **fields)
    assert echoed.choices[0].text == "one" + plain.choices[0].text
    assert echoed.choices[0].logprobs is not None
    assert echoed.choices[0].logprobs.token_logprobs is not None
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    text = plain.choices[0].text
    stop = text[5:8]
    stopped = client.completions.create(prompt="one", stop=[stop], **fields)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_async_clients_side_by_side_get_what_one_alone_gets(base_url: str) -> None:
    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="sk-right", max_retries=0) as client:

            async def whole(number: int) -> str | None:
                messages: list[Any] = [{"role": "user", "content": f"question {number}"}]
                answer = await client.chat.completions.create(
                    model="org/tiny", messages=messages, max_tokens=24, temperature=0
                )
                return answer.choices[0].message.content

            async def streamed(number: int) -> str:
                messages: list[Any] = [{"role": "user", "content": f"question {number}"}]
                pieces = await client.chat.completions.create(
                    model="org/tiny", messages=messages, max_tokens=24, temperature=0, stream=True
                )
                return "".join([piece.choices[0].delta.content or "" async for piece in pieces])

            alone = [await whole(number) for number in range(6)]
            together = await asyncio.gather(*(streamed(number) for number in range(6)))
            assert list(together) == alone
            return alone

    assert len(set(asyncio.run(run()))) == 6


def test_the_sdk_raises_its_own_errors(client: openai.OpenAI, base_url: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="model", messages=MESSAGES, temperature=9)
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(
            model="model", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base_url, api_key="sk-wrong", max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == ["org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"
