"""--static-cache True: the same tokens over HTTP, and both numbers for who does not fit."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests import zoo
from tests.e2e.serving_tiny import serve_tiny
from tests.engine.harness import reference


def test_a_static_cache_serves_the_same_tokens_and_refuses_what_does_not_fit(checkpoints: Path) -> None:
    options = {"static_cache": True, "static_cache_decoder_max_length": 96, "continuous_batching_batch_size": 4}
    with (
        serve_tiny("qwen3", checkpoints, max_model_len=None, **options) as server,
        openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client,
    ):
        prompt = zoo.prompt(40)
        answer = client.completions.create(
            model="model",
            prompt=[prompt] * 6,
            max_tokens=20,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        expected = reference("qwen3", prompt, 20)
        assert [list(choice.token_ids) for choice in answer.choices] == [expected] * 6  # type: ignore[attr-defined]
        allocated = 4 * 96 * server.manager.info.kv_bytes_per_token
        assert server.manager.stats.kv_bytes_allocated == allocated
        with pytest.raises(openai.BadRequestError, match=r"80 tokens .* 20.* 96 tokens") as refused:
            client.completions.create(model="model", prompt=zoo.prompt(80), max_tokens=20)
        assert refused.value.code == "context_length_exceeded"
