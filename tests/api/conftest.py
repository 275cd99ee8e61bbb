"""The application around a scripted engine: in the loop of the test, or as a server of its own thread.

Knows nothing of models.
Read by pytest.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from transformers import PreTrainedTokenizerFast

from app import create_app
from config import Settings
from model_manager import ModelManager
from tests.api.scripted import ScriptedEngine, byte_tokenizer, says, stack

REPLY = "Grüße, 世界!"


@dataclass
class Harness:
    """A running app, and what it stands on."""

    engine: ScriptedEngine
    manager: ModelManager
    settings: Settings
    app: Any
    client: httpx.AsyncClient


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> ScriptedEngine:
    return ScriptedEngine(says(ids_of(tokenizer, REPLY), tokenizer.eos_token_id))


MakeHarness = Callable[..., contextlib.AbstractAsyncContextManager[Harness]]


@pytest.fixture
def harness(engine: ScriptedEngine, tokenizer: PreTrainedTokenizerFast) -> MakeHarness:
    """Opens an app with the given options, in the loop of the test."""

    @contextlib.asynccontextmanager
    async def make(*, is_loaded: bool = True, **options: Any) -> AsyncIterator[Harness]:
        settings = Settings(hf_model="org/tiny", **options)
        manager = ModelManager(settings, stack(engine, tokenizer))
        async with opened(settings, manager, is_loaded=is_loaded) as (app, client):
            yield Harness(engine, manager, settings, app, client)

    return make


@contextlib.asynccontextmanager
async def opened(
    settings: Settings, manager: ModelManager, *, is_loaded: bool = True
) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    """An app around a manager, and a client that calls it without sockets."""
    app = create_app(settings, manager)
    async with app.router.lifespan_context(app):
        if is_loaded:
            await manager.wait_until_loaded()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield app, client


def run_async(coroutine: Any) -> Any:
    """Runs a test's coroutine, for at most half a minute."""
    return asyncio.run(asyncio.wait_for(coroutine, 30))


@dataclass
class LiveServer:
    """A server on a port of its own."""

    url: str
    manager: ModelManager
    engine: ScriptedEngine


@pytest.fixture
def live(engine: ScriptedEngine, tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., LiveServer]]:
    """Starts real servers, in threads, and ends them with the test."""
    with contextlib.ExitStack() as servers:
        yield lambda **options: servers.enter_context(_serve(engine, tokenizer, options))


@contextlib.contextmanager
def _serve(engine: ScriptedEngine, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> Iterator[LiveServer]:
    settings = Settings(hf_model="org/tiny", shutdown_timeout=1, **options)
    manager = ModelManager(settings, stack(engine, tokenizer))
    with serving(settings, manager) as url:
        yield LiveServer(url, manager, engine)


@contextlib.contextmanager
def serving(settings: Settings, manager: ModelManager) -> Iterator[str]:
    """A real server around a manager, in a thread; its address."""
    config = uvicorn.Config(create_app(settings, manager), log_config=None, lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not (server.started and manager.state == "ready"):
                if not thread.is_alive():
                    raise RuntimeError("the server did not start")
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
