"""Two thousand requests, valid, invalid and given up, none of which may be a 5xx or leave anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import Any

from models import ChatCompletionRequest, CompletionRequest
from tests.api.conftest import MakeHarness, run_async
from tests.api.scripted import says
from tests.api.test_chat import HELLO

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 20, 2**31, 2**63, 2**64, -(2**70), 0.0, 0.5, 1e-320, 1e308,
    float("nan"), float("inf"),
    "", "a", "\x00", "世" * 50, [], [[]], [0], [1, 2], ["a"], ["a", "b", "c", "d", "e"], [None], {}, {"a": 1}, {"1": 5},
    {"type": "text"}, [{"role": "user", "content": "x"}], [{"role": "assistant", "content": None}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "tool", "content": "x", "tool_call_id": "y"}],
    [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "nope"}}]}],
    "<|im_start|>", {"include_usage": True}, "auto", "none", 10**400,
]  # fmt: skip
EXTRA = [
    "tools",
    "tool_choice",
    "response_format",
    "best_of",
    "suffix",
    "store",
    "colour",
    "audio",
    "modalities",
    "é\r\n",
]


def random_body(rng: random.Random, *, is_chat: bool) -> dict[str, Any]:
    model = ChatCompletionRequest if is_chat else CompletionRequest
    names = [*model.model_fields, *EXTRA]
    body: dict[str, Any] = dict(HELLO) if is_chat else {"prompt": rng.choice(["a", ["a", "b"], [65], [[65], [66]]])}
    for name in rng.sample(names, rng.choice([0, 1, 1, 2, 4])):
        body[name] = rng.choice(VALUES)
    return body


def test_mixed_requests_are_answered_by_200_or_4xx(harness: MakeHarness) -> None:
    async def scenario() -> None:
        rng = random.Random(5)
        seen: dict[int, int] = {}
        async with harness(max_concurrent=10_000) as h:
            h.engine.script = says([65] * 20, None)

            async def one(is_chat: bool, body: dict[str, Any], patience_s: float) -> None:
                path = "/v1/chat/completions" if is_chat else "/v1/completions"
                content = json.dumps(body).encode()
                headers = {"content-type": "application/json"}
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        response = await h.client.post(path, content=content, headers=headers)
                        seen[response.status_code] = seen.get(response.status_code, 0) + 1
                        assert response.status_code in (200, 400, 404), (body, response.text)
                        if response.status_code != 200:
                            error = response.json()["error"]
                            assert error["message"] and len(response.content) < 1000, error
                        elif body.get("stream"):
                            assert response.text.endswith("data: [DONE]\n\n")
                            assert '"error"' not in response.text, (body, response.text)

            for _ in range(20):
                kinds = [rng.random() < 0.6 for _ in range(100)]
                bodies = [random_body(rng, is_chat=kind) for kind in kinds]
                patience = [rng.choice([20.0, 20.0, 20.0, 0.01]) for _ in kinds]
                await asyncio.gather(*map(one, kinds, bodies, patience))
            while h.engine.running or h.manager.num_admitted:
                await asyncio.sleep(0.01)
        assert seen[200] > 200 and seen[400] > 200

    run_async(scenario())
