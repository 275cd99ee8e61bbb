"""Encoder-decoders over HTTP: generate's tokens, the demo's golden answers, and every field that clients use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import zoo_seq2seq as zoo
from tests.e2e.serving_tiny import TinyServer, serve, utf8_tokenizer
from tests.zoo import prompt

ROOT = Path(__file__).parents[2]
GOLDENS: list[dict[str, Any]] = json.loads((ROOT / "demo" / "t5" / "golden.json").read_text(encoding="utf-8"))
LENGTHS = (5, 40, 17, 3, 61, 1, 24, 33)
NUM_TOKENS = 20


@pytest.mark.parametrize("name", ["t5", "m2m_100", "led"])
def test_eight_at_once_get_the_tokens_of_generate(name: str, tmp_path: Path) -> None:
    model = zoo.make(name)
    model.save_pretrained(tmp_path)
    utf8_tokenizer().save_pretrained(tmp_path)
    texts = [prompt(length, seed=number) for number, length in enumerate(LENGTHS)]
    expected = [zoo.generate(model, ids, NUM_TOKENS) for ids in texts]

    async def ask_all(server: TinyServer) -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="model",
                        prompt=ids,
                        max_tokens=NUM_TOKENS,
                        temperature=0,
                        extra_body={"return_token_ids": True, "ignore_eos": True},
                    )
                    for ids in texts
                )
            )
        for answer, ids in zip(answers, texts, strict=True):
            assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
            assert answer.choices[0].prompt_token_ids == ids  # type: ignore[attr-defined]
        return [list(answer.choices[0].token_ids) for answer in answers]  # type: ignore[attr-defined]

    with serve(str(tmp_path), max_model_len=128) as server:
        assert server.manager.info.lane == ("solo" if name in zoo.SOLO_FAMILIES else "seq2seq")
        assert asyncio.run(ask_all(server)) == expected
        assert asyncio.run(ask_all(server)) == expected


@pytest.fixture(scope="module")
def server() -> Iterator[TinyServer]:
    with serve("demo-t5") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: TinyServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    message = {"role": "user", "content": text}
    return client.chat.completions.create(**{"model": "demo-t5", "messages": [message], "temperature": 0, **fields})


def test_the_demo_gives_its_golden_answers_whole_and_streamed(client: openai.OpenAI) -> None:
    assert len(GOLDENS) >= 15
    for golden in GOLDENS:
        answer = ask(client, golden["prompt"])
        assert answer.choices[0].message.content == golden["answer"]
        assert answer.usage.completion_tokens == golden["num_tokens"]
        chunks = ask(client, golden["prompt"], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == golden["answer"]
        text = client.completions.create(model="model", prompt=golden["prompt"], max_tokens=60, temperature=0)
        assert text.choices[0].text == golden["answer"]


def test_the_same_text_again_skips_the_encoder(client: openai.OpenAI) -> None:
    text = "date: 29 February 2016"
    first, again = (ask(client, text).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens == first.prompt_tokens


def test_a_system_message_goes_before_the_text_and_longer_chats_are_lines(client: openai.OpenAI) -> None:
    alone = ask(client, "words: 17", extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    system = {"role": "system", "content": "words:"}
    user = {"role": "user", "content": "17"}
    joined = ask(client, "", messages=[system, user], extra_body={"return_token_ids": True}).choices[0]
    lines = ask(client, "", messages=[user, {"role": "assistant", "content": "a"}, user],
                extra_body={"return_token_ids": True}).choices[0]  # fmt: skip
    same = ask(client, "User: 17\nAssistant: a\nUser: 17", extra_body={"return_token_ids": True}).choices[0]
    assert joined.prompt_token_ids != alone
    assert lines.prompt_token_ids == same.prompt_token_ids


def test_sampling_fields_work_as_for_decoders(client: openai.OpenAI) -> None:
    text = "words: 123456"
    # It is sure of what it was trained on, so it is asked something else.
    fields = {"n": 8, "temperature": 2, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    once, again = (ask(client, "digits: seventy eleven of twelve", seed=5, **fields) for _ in range(2))
    texts = [choice.message.content for choice in once.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert all(len(entry.top_logprobs) == 2 for entry in once.choices[0].logprobs.content)
    stopped = ask(client, text, stop=" thousand").choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("one hundred and twenty-three", "stop")
    assert ask(client, text, max_tokens=2).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"extra_body": {"forced_bos_token": "<nowhere>"}}, "forced_bos_token", "must be a token of this model"),
        ({"extra_body": {"forced_bos_token": 10**9}}, "forced_bos_token", "from 0 to"),
        ({"extra_body": {"source_language": "de"}}, "source_language", "marks no languages"),
        ({"extra_body": {"continue_final_message": True}}, "messages", "no message can be continued"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(client, "words: 7", **fields)
    assert refused.value.param == param


def test_a_forced_beginning_changes_the_answer(client: openai.OpenAI, server: TinyServer) -> None:
    eight = server.manager.tokenizer.convert_tokens_to_ids("8")
    answer = ask(client, "digits: two hundred and five", extra_body={"forced_bos_token": eight})
    assert answer.choices[0].message.content != "205"


def test_echo_and_audio_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not continue its prompt"):
        client.completions.create(model="model", prompt="words: 7", echo=True)
    with pytest.raises(openai.NotFoundError, match="no speech model"):
        client.audio.transcriptions.create(model="model", file=("a.wav", b"RIFF"))
