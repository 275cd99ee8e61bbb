"""Request ids, durations, and the limit on bodies."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.api.conftest import MakeHarness, run_async
from tests.api.test_chat import HELLO, post


@pytest.mark.parametrize("given", ["mine-1", "x" * 128])
def test_a_printable_request_id_is_echoed(harness: MakeHarness, given: str) -> None:
    async def scenario() -> None:
        async with harness() as h:
            response = await post(h, HELLO, headers={"x-request-id": given})
            assert response.headers["x-request-id"] == given

    run_async(scenario())


@pytest.mark.parametrize("given", ["", "x" * 129, "a\tb", "ü"])
def test_any_other_is_replaced(harness: MakeHarness, given: str) -> None:
    async def scenario() -> None:
        async with harness() as h:
            response = await post(h, HELLO, headers={"x-request-id": given.encode()})
            assert response.headers["x-request-id"].startswith("req_")

    run_async(scenario())


def test_durations_are_whole_milliseconds(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            assert (await post(h, HELLO)).headers["openai-processing-ms"].isdecimal()

    run_async(scenario())


def test_bodies_are_counted_while_they_are_read(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness(max_body_size=1000) as h:
            num_sent = 0

            async def endless() -> AsyncIterator[bytes]:
                nonlocal num_sent
                while True:
                    num_sent += 100
                    yield b" " * 100

            headers = {"content-type": "application/json"}
            response = await h.client.post("/v1/chat/completions", content=endless(), headers=headers)
            assert response.status_code == 413
            assert (
                response.json()["error"]["code"] == "request_too_large"
                and "1000" in response.json()["error"]["message"]
            )
            assert num_sent <= 1200
            num_sent = 0
            for announced in ("1001", "9" * 5000):
                response = await h.client.post(
                    "/v1/chat/completions", content=endless(), headers={**headers, "content-length": announced}
                )
                assert response.status_code == 413 and num_sent == 0
            body = json.dumps(HELLO).encode()
            for size, status in ((1000, 200), (1001, 413)):
                padded = body + b" " * (size - len(body))
                response = await h.client.post("/v1/chat/completions", content=padded, headers=headers)
                assert response.status_code == status

    run_async(scenario())
