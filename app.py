"""Puts the application together: the manager's life, middleware, error bodies, routes.

Knows nothing of how any of them works; no state but what hangs on the app.
Called by main.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from api import audio, catalog, chat, completions
from api.deps import Parts, check_key
from api.errors import wire_error
from api.middleware import BodyLimit, RequestContext
from api.sse import leave_streams_to_the_drain
from audio.errors import AudioError
from config import Settings
from engine.errors import ServerError
from model_manager import ModelManager
from text.errors import PromptError

# Older clients of this API ask without the version.
PREFIXES = ("/v1", "")
# Beyond what browsers show to pages by themselves.
_EXPOSED_HEADERS = (
    "openai-processing-ms",
    "retry-after",
    "retry-after-ms",
    "x-ignored-parameters",
    "x-request-id",
    "x-should-retry",
)


def create_app(settings: Settings, manager: ModelManager | None = None) -> FastAPI:
    """An application that serves one model.

    Args:
        settings: the options.
        manager: the way to the model; the app starts and closes it. Made from the settings when not given.
    """
    manager = ModelManager(settings) if manager is None else manager
    leave_streams_to_the_drain()
    app = FastAPI(
        title="transformers-openai-api",
        lifespan=_lifespan,
        middleware=_middleware(settings),
        exception_handlers=_exception_handlers(),
        # The schema's routes would be open to requests without a key.
        openapi_url=None,
        redirect_slashes=False,
    )
    routers = (catalog.router, chat.router, completions.router, audio.router)
    routes = [route for router in (catalog.open_router, *routers) for route in router.routes]
    paths = [PREFIXES[0] + route.path for route in routes if isinstance(route, APIRoute) and route.path != "/"]
    app.state.parts = Parts(settings, manager, paths)
    for prefix in PREFIXES:
        app.include_router(catalog.open_router, prefix=prefix)
        for router in routers:
            app.include_router(router, prefix=prefix, dependencies=[Depends(check_key)])
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The manager lives as long as the app; it loads while requests are already answered with 503."""
    parts: Parts = app.state.parts
    await parts.manager.start()
    yield
    await parts.manager.drain(parts.settings.shutdown_timeout)
    await parts.manager.close()


def _middleware(settings: Settings) -> list[Middleware]:
    """From the outside in."""
    limit = Middleware(BodyLimit, max_bytes=settings.max_body_size, max_upload_bytes=settings.max_audio_size)
    middleware = [Middleware(RequestContext), limit]
    if settings.allowed_origins:
        # Outermost, so that browsers may read errors too. Any header: clients send x-stainless-*, idempotency-key, ...
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST", "OPTIONS"),
            allow_headers=("*",),
            expose_headers=_EXPOSED_HEADERS,
        )
        middleware.insert(0, cors)
    return middleware


def _exception_handlers() -> dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]:
    return {
        ServerError: _answer_error,
        PromptError: _answer_error,
        AudioError: _answer_error,
        HTTPException: _answer_error,
        RequestValidationError: _answer_error,
        ClientDisconnect: _answer_nobody,
    }


async def _answer_error(request: Request, error: Exception) -> Response:
    return wire_error(error).response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client has gone: nothing can be sent, and nothing went wrong."""
    return Response(status_code=499)
