"""How the application is put together: what importing costs, who may call what, browsers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.routing import iter_route_contexts

from api.deps import check_key
from tests.api.conftest import MakeHarness, engine, harness, run_async, tokenizer
from tests.api.test_chat import HELLO, post

__all__ = ["engine", "harness", "tokenizer"]  # fixtures

ROOT = Path(__file__).parent.parent
OPEN_PATHS = {"/health", "/ready", "/v1/health", "/v1/ready"}


def test_importing_the_application_imports_no_torch() -> None:
    code = "import app, sys; print([m for m in ('torch', 'transformers', 'tokenizers', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_route_but_health_and_ready_asks_for_a_key(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness(api_key=("secret",)) as h:
            routes = list(iter_route_contexts(h.app.routes))
            assert len(routes) == 20
            for route in routes:
                is_guarded = any(check_key is needed.call for needed in route.dependant.dependencies)
                assert is_guarded == (route.path not in OPEN_PATHS), route.path
                assert route.path is not None and route.methods
                path = route.path.replace("{name:path}", "org/tiny")
                (method,) = route.methods
                response = await h.client.request(method, path)
                assert (response.status_code == 401) == is_guarded

    run_async(scenario())


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer secrets", "Bearer sécret"],
)
def test_wrong_keys_are_refused(harness: MakeHarness, header: str | None) -> None:
    async def scenario() -> None:
        async with harness(api_key=("secret", "other")) as h:
            headers = {} if header is None else {"authorization": header.encode()}
            response = await post(h, HELLO, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"

    run_async(scenario())


@pytest.mark.parametrize("header", ["Bearer secret", "bearer other", "Bearer  secret "])
def test_any_of_the_keys_opens(harness: MakeHarness, header: str) -> None:
    async def scenario() -> None:
        async with harness(api_key=("secret", "other")) as h:
            assert (await post(h, HELLO, headers={"authorization": header})).status_code == 200

    run_async(scenario())


def test_browsers_may_call_from_allowed_origins_and_read_errors(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness(allowed_origins=("https://a.example",), api_key=("k",)) as h:
            wanted = "authorization, content-type, x-stainless-lang, idempotency-key"
            response = await h.client.options(
                "/v1/chat/completions",
                headers={
                    "origin": "https://a.example",
                    "access-control-request-method": "POST",
                    "access-control-request-headers": wanted,
                },
            )
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == "https://a.example"
            allowed = response.headers["access-control-allow-headers"].lower()
            assert all(name in allowed for name in wanted.split(", "))
            refused = await post(h, HELLO, headers={"origin": "https://a.example"})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "https://a.example"
            assert "x-request-id" in refused.headers["access-control-expose-headers"]
            other = await post(h, HELLO, headers={"origin": "https://b.example"})
            assert "access-control-allow-origin" not in other.headers

    run_async(scenario())


def test_there_is_no_cors_unless_asked_for(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            response = await post(h, HELLO, headers={"origin": "https://a.example"})
            assert "access-control-allow-origin" not in response.headers

    run_async(scenario())
