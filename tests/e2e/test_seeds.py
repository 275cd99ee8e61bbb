"""A request with a seed gives the same tokens alone, in company, and after a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai

from tests import zoo
from tests.e2e.serving_tiny import TinyServer, serve_tiny

FIELDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "extra_body": {"top_k": 20, "min_p": 0.02}},
    {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": 0.3},
]


async def _ask(client: openai.AsyncOpenAI, number: int, fields: dict[str, Any], seed: int) -> list[int]:
    extra = {"return_token_ids": True, "ignore_eos": True, **fields.get("extra_body", {})}
    answer = await client.completions.create(
        **{
            "model": "model",
            "prompt": zoo.prompt(20 + 9 * number, seed=number),
            "max_tokens": 30,
            "seed": seed,
            **fields,
            "extra_body": extra,
        }
    )
    return list(answer.choices[0].token_ids)


def _collect(server: TinyServer, *, with_neighbours: bool) -> list[list[int]]:
    async def run() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            answers = []
            for number, fields in enumerate(FIELDS):
                asked = [_ask(client, number, fields, seed=1234 + number)]
                if with_neighbours:
                    asked += [_ask(client, other, FIELDS[other % 4], seed=other) for other in range(4, 11)]
                answers.append((await asyncio.gather(*asked))[0])
            return answers

    return asyncio.run(run())


def test_a_seed_decides_alone_in_company_and_after_a_restart(checkpoints: Path) -> None:
    with serve_tiny("qwen2", checkpoints) as server:
        alone = _collect(server, with_neighbours=False)
        in_company = _collect(server, with_neighbours=True)
    with serve_tiny("qwen2", checkpoints) as server:
        after_restart = _collect(server, with_neighbours=True)
    assert alone == in_company == after_restart
    assert all(zoo.is_diverse([answer]) for answer in alone)


def test_several_choices_differ_and_repeat_with_the_seed(checkpoints: Path) -> None:
    with serve_tiny("qwen2", checkpoints) as server, openai.OpenAI(base_url=server.base_url, api_key="none") as client:

        def ask(seed: int) -> list[list[int]]:
            answer = client.completions.create(
                model="model",
                prompt=zoo.prompt(30),
                max_tokens=12,
                n=3,
                seed=seed,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            return [list(choice.token_ids) for choice in answer.choices]  # type: ignore[attr-defined]

        first, again, other = ask(5), ask(5), ask(6)
    assert first == again != other
    assert len({tuple(ids) for ids in first}) == 3
