"""Through HTTP, with prompts of token ids: the tokens of model.generate, alone and eight at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from tests import zoo
from tests.e2e.serving_tiny import TinyServer, serve_tiny
from tests.engine.harness import reference

LENGTHS = (5, 40, 90, 3, 70, 1, 64, 33)
NUM_TOKENS = 20


def _prompts() -> list[list[int]]:
    return [zoo.prompt(length, seed=number) for number, length in enumerate(LENGTHS)]


async def _ask(client: openai.AsyncOpenAI, prompt: list[int], *, delay_s: float, stream: bool) -> list[int]:
    await asyncio.sleep(delay_s)
    extra = {"return_token_ids": True, "ignore_eos": True}
    if not stream:
        whole = await client.completions.create(
            model="model", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, extra_body=extra
        )
        assert whole.usage is not None and whole.usage.completion_tokens == NUM_TOKENS
        return list(whole.choices[0].token_ids)  # type: ignore[attr-defined]
    chunks = await client.completions.create(
        model="model", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, extra_body=extra, stream=True
    )
    ids: list[int] = []
    async for chunk in chunks:
        for choice in chunk.choices:
            ids.extend(getattr(choice, "token_ids", None) or [])
    return ids


async def _eight_at_once(server: TinyServer) -> list[list[int]]:
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        return await asyncio.gather(
            *(
                _ask(client, prompt, delay_s=0.01 * number, stream=number % 2 == 0)
                for number, prompt in enumerate(_prompts())
            )
        )


async def _one_by_one(server: TinyServer) -> list[list[int]]:
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        return [await _ask(client, prompt, delay_s=0, stream=False) for prompt in _prompts()[:3]]


def _check(server: TinyServer, name: str) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in _prompts()]
    assert asyncio.run(_one_by_one(server)) == expected[:3]
    assert asyncio.run(_eight_at_once(server)) == expected
    # Every prompt's prefix is computed by now.
    assert asyncio.run(_eight_at_once(server)) == expected


@pytest.mark.parametrize("name", sorted(zoo.FLAT_FAMILIES))
def test_flat_families(name: str, checkpoints: Path) -> None:
    with serve_tiny(name, checkpoints) as server:
        assert server.manager.info.lane == "flat", server.manager.info.lane_reason
        _check(server, name)
        assert server.manager.stats.prefix_cache_hits_total > 0


@pytest.mark.parametrize(
    "name", ["bloom", "mpt", "gptj", "falcon", "mamba", "recurrent_gemma", "jamba", "phi3_longrope"]
)
def test_solo_families(name: str, checkpoints: Path) -> None:
    with serve_tiny(name, checkpoints) as server:
        assert server.manager.info.lane == "solo"
        _check(server, name)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_chunked_prefill(name: str, checkpoints: Path) -> None:
    with serve_tiny(name, checkpoints, max_batch_tokens=20) as server:
        _check(server, name)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_budget_so_small_that_sequences_are_preempted(name: str, checkpoints: Path) -> None:
    # 512 bytes a token: two slots of 256 tokens are all there is, and each sequence outgrows its first slot of 128.
    prompts = [zoo.prompt(50, seed=number) for number in range(8)]
    expected = [reference(name, prompt, 120) for prompt in prompts]

    async def ask_all(server: TinyServer) -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            extra = {"return_token_ids": True, "ignore_eos": True}
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="model", prompt=prompt, max_tokens=120, temperature=0, extra_body=extra
                    )
                    for prompt in prompts
                )
            )
            return [list(answer.choices[0].token_ids) for answer in answers]  # type: ignore[attr-defined]

    with serve_tiny(name, checkpoints, kv_cache_memory=512 * 512) as server:
        assert asyncio.run(ask_all(server)) == expected
        assert server.manager.stats.preemptions_total > 0
