"""OpenAI's own client against a real server, sync and async, every frame of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import openai
import pytest

from engine.errors import NonFiniteLogits, QueueFull
from engine.sequence import Sequence
from tests.api.conftest import REPLY, LiveServer, run_async
from tests.api.scripted import fails, says

Live = Callable[..., LiveServer]
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


def client_of(server: LiveServer, path: str = "/v1") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + path, api_key="secret", max_retries=0, timeout=20)


@pytest.mark.parametrize("path", ["/v1", "", "/"])
def test_chat_whole_and_streamed(live: Live, path: str) -> None:
    server = live(api_key=("secret",))
    with client_of(server, path) as client:
        whole = client.chat.completions.create(model="org/tiny", messages=MESSAGES, n=2)
        assert [choice.message.content for choice in whole.choices] == [REPLY, REPLY]
        assert whole.usage is not None and whole.usage.completion_tokens_details is not None
        assert whole._request_id
        server.engine.step_s = 0.002
        stream = client.chat.completions.create(
            model="org/tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[1:-2]]
        assert "".join(pieces) == REPLY and all(pieces) and "\ufffd" not in "".join(pieces)
        assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-2].choices[0].delta.content is None
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_completions_and_models(live: Live) -> None:
    with client_of(live()) as client:
        whole = client.completions.create(model="model", prompt=["a", "b"], echo=True, logprobs=2, max_tokens=2)
        assert [choice.text for choice in whole.choices] == ["aGr", "bGr"]
        assert whole.choices[1].logprobs is not None and whole.choices[1].logprobs.tokens == ["b", "G", "r"]
        stream = client.completions.create(model="model", prompt="a", stream=True, max_tokens=2)
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Gr"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert client.models.retrieve(client.models.list().data[0].id).id == "org/tiny"


def test_the_streaming_helper_accumulates_choices_and_logprobs(live: Live) -> None:
    with client_of(live()) as client:
        with client.chat.completions.stream(
            model="model", messages=MESSAGES, n=2, logprobs=True, top_logprobs=1
        ) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        assert [choice.message.content for choice in final.choices] == [REPLY, REPLY]
        for choice in final.choices:
            assert choice.logprobs is not None and choice.logprobs.content is not None
            assert bytes(b for entry in choice.logprobs.content for b in entry.bytes or ()).decode() == REPLY


def test_errors_are_the_clients_own_exceptions(live: Live) -> None:
    server = live(api_key=("secret",))
    with client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="model", messages=MESSAGES, temperature=3)
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        server.engine.script = fails(NonFiniteLogits("NaN"), after=[65])
        with pytest.raises(openai.APIError, match="NaN"):
            list(client.chat.completions.create(model="model", messages=MESSAGES, stream=True))


def test_the_client_comes_back_when_told_to_and_only_then(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    server = live()
    asked: list[int] = []
    add = server.engine.add

    def counting_add(sequence: Sequence) -> None:
        asked.append(sequence.sequence_id)
        add(sequence)

    monkeypatch.setattr(server.engine, "add", counting_add)
    with client_of(server).with_options(max_retries=2) as client:
        server.engine.refusal = QueueFull("full", retry_after_s=0.01)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="model", messages=MESSAGES)
        assert len(asked) == 3
        server.engine.refusal = NonFiniteLogits("NaN")
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="model", messages=MESSAGES)
        assert len(asked) == 4


def test_async_clients_stream_side_by_side(live: Live) -> None:
    server = live()
    server.engine.script = says([65] * 50, None)
    server.engine.step_s = 0.001

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:

            async def one(number: int) -> int:
                stream = await client.chat.completions.create(
                    model="model", messages=MESSAGES, stream=True, max_tokens=number + 1
                )
                return len("".join([chunk.choices[0].delta.content or "" async for chunk in stream]))

            assert await asyncio.gather(*(one(number) for number in range(40))) == list(range(1, 41))

    run_async(scenario())
