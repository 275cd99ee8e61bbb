"""Structured outputs over HTTP: what ended well is valid, however it was asked, whatever shared the batch."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.serving_tiny import TinyServer, serve, serve_tiny
from tests.text.test_grammar import SCHEMAS

REGEXES = ["[a-c]{2,5}", "(foo|ba+r) ?[0-9]{1,3}", "[0-9]{2}:[0-9]{2}", "Gr(ü|u)ß[ef]*"]
LARK = 'start: greeting " " name\ngreeting: "hi" | "hello"\nname: /[A-Z][a-z]{1,4}/'
NUM_TOKENS = 120
SEEDS = range(4)


class Person(BaseModel):
    """What the SDK makes a schema of."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    mood: Literal["happy", "sad"]


def asks() -> list[dict[str, Any]]:
    """One request of every kind; names beginning with _ say how to check the answer."""
    schemas: list[dict[str, Any]] = [{"guided_json": schema, "_schema": schema} for schema in SCHEMAS.values()]
    regexes: list[dict[str, Any]] = [{"structured_outputs": {"regex": regex}, "_regex": regex} for regex in REGEXES]
    return [
        *schemas,
        *regexes,
        {"response_format": {"type": "json_object"}, "_schema": {"type": "object"}},
        {"guided_choice": ["yes", "no", "yes, but"], "_regex": "yes|no|yes, but"},
        {"guided_grammar": LARK, "_regex": "(hi|hello) [A-Z][a-z]{1,4}"},
        {},
    ]


def check(ask: dict[str, Any], text: str) -> None:
    if "_schema" in ask:
        jsonschema.validate(json.loads(text), ask["_schema"])
    if "_regex" in ask:
        assert re.fullmatch(ask["_regex"], text)


async def answer(client: httpx.AsyncClient, ask: dict[str, Any], seed: int, **more: Any) -> tuple[str, str]:
    """Text and finish reason of one request at temperature 1."""
    fields = {name: value for name, value in ask.items() if not name.startswith("_")}
    body = {"prompt": f"request {seed}", "seed": seed, "max_tokens": NUM_TOKENS, **fields, **more}
    if not more.get("stream"):
        response = await client.post("/completions", json=body)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        return choice["text"], choice["finish_reason"]
    texts, reason = [], ""
    async with client.stream("POST", "/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                texts.append(choice["text"])
                reason = choice["finish_reason"] or reason
    return "".join(texts), reason


def collect(server: TinyServer, *, together: bool, **more: Any) -> list[tuple[str, str]]:
    async def run() -> list[tuple[str, str]]:
        async with httpx.AsyncClient(base_url=server.base_url, timeout=120) as client:
            wanted = [answer(client, ask, seed, **more) for ask in asks() for seed in SEEDS]
            return list(await asyncio.gather(*wanted)) if together else [await one for one in wanted]

    return asyncio.run(run())


@pytest.fixture(scope="module", params=["llama", "bloom"])  # one model of each lane
def server(checkpoints: Path, request: pytest.FixtureRequest) -> Iterator[TinyServer]:
    with serve_tiny(request.param, checkpoints) as made:
        yield made


def test_what_ended_well_is_valid_streamed_or_not_alone_or_in_company(server: TinyServer) -> None:
    together = collect(server, together=True)
    numbers = [number for number, _ in enumerate(asks()) for _ in SEEDS]
    ended = set()
    for number, (text, reason) in zip(numbers, together, strict=True):
        if reason == "stop":
            check(asks()[number], text)
            ended.add(number)
    assert len(ended) >= len(asks()) - 3  # the rest may go on for as long as they like
    assert len({text for text, _ in together}) > len(together) // 2
    assert collect(server, together=True, stream=True) == together
    assert collect(server, together=False) == together


def test_preempted_is_as_if_undisturbed(checkpoints: Path) -> None:
    with serve_tiny("llama", checkpoints) as server:
        undisturbed = collect(server, together=True, max_tokens=200)
    # Room for a few sequences of the twenty that a step may have, in KV that grows on the way.
    bytes_per_token = server.manager.info.kv_bytes_per_token
    with serve_tiny("llama", checkpoints, kv_cache_memory=bytes_per_token * 700) as server:
        assert collect(server, together=True, max_tokens=200) == undisturbed
        assert server.manager.stats.preemptions_total > 0


def ask(server: TinyServer, **body: Any) -> dict[str, Any]:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, "seed": 1, **body}
    response = httpx.post(f"{server.base_url}/chat/completions", json=fields, timeout=60)
    assert response.status_code == 200, response.text
    choices: dict[str, Any] = response.json()
    return choices


def test_a_complete_text_ends_at_once_whatever_else_is_asked(server: TinyServer) -> None:
    for more in ({}, {"min_tokens": 20}, {"ignore_eos": True}, {"max_tokens": 4}, {"temperature": 0}):
        choice = ask(server, guided_regex="[0-9]{4}", **more)["choices"][0]
        assert re.fullmatch("[0-9]{4}", choice["message"]["content"]) and choice["finish_reason"] == "stop"


def test_while_a_text_may_go_on_min_tokens_and_ignore_eos_make_it(server: TinyServer) -> None:
    for more in ({"min_tokens": 30}, {"ignore_eos": True}):
        answer = ask(server, guided_regex="[ab]*", return_token_ids=True, **more)
        assert answer["usage"]["completion_tokens"] >= 30
        assert re.fullmatch("[ab]*", answer["choices"][0]["message"]["content"])


def test_what_was_cut_is_the_beginning_of_what_keeps_to_it(server: TinyServer) -> None:
    choice = ask(server, guided_regex="a{50}b", max_tokens=7)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a" * 7, "length")
    choice = ask(server, guided_regex="a{9}b{9}", stop="bb")["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a" * 9, "stop")


def test_choices_and_logprobs_go_together_with_a_grammar(server: TinyServer) -> None:
    answer = ask(server, guided_choice=["yes", "no"], n=3, logprobs=True, top_logprobs=2, frequency_penalty=1)
    for choice in answer["choices"]:
        entries = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
        assert choice["message"]["content"] in ("yes", "no")
        # The model's own, of everything: what the grammar forbids is among the likeliest.
        assert all(entry["logprob"] < 0 and len(entry["top_logprobs"]) == 2 for entry in entries)


@pytest.fixture(scope="module")
def demo() -> Iterator[TinyServer]:
    with serve("demo") as made:
        yield made


def test_the_sdk_parses_what_the_demo_says(demo: TinyServer) -> None:
    with openai.OpenAI(base_url=demo.base_url, api_key="none", max_retries=0) as client:
        for seed in range(4):
            completion = client.chat.completions.parse(
                model="model",
                messages=[{"role": "user", "content": "Tell me about somebody."}],
                response_format=Person,
                max_tokens=200,
                seed=seed,
            )
            person = completion.choices[0].message.parsed
            assert isinstance(person, Person) and completion.choices[0].finish_reason == "stop"


def test_the_sdk_parses_a_stream_of_the_demo(demo: TinyServer) -> None:
    with (
        openai.OpenAI(base_url=demo.base_url, api_key="none", max_retries=0) as client,
        client.chat.completions.stream(
            model="model",
            messages=[{"role": "user", "content": "Tell me about somebody."}],
            response_format=Person,
            max_tokens=200,
            seed=3,
        ) as stream,
    ):
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds
    assert isinstance(final.choices[0].message.parsed, Person)


def test_an_encoder_decoder_keeps_to_grammars_too() -> None:
    dates = r"[12][0-9]{3}-(0[1-9]|1[0-2])-[0-3][0-9]"
    with serve("demo-t5") as server:
        choice = ask(server, messages=[{"role": "user", "content": "date: March 5th, 2021"}], temperature=0,
                     guided_regex=dates)["choices"][0]  # fmt: skip
        assert (choice["message"]["content"], choice["finish_reason"]) == ("2021-03-05", "stop")
        # What it would not say by itself.
        choice = ask(server, messages=[{"role": "user", "content": "words: 12"}], guided_regex=dates)["choices"][0]
        assert re.fullmatch(dates, choice["message"]["content"])
