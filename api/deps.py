"""What routes ask for before they begin: the parts of the app, a valid key, a place in the server, a parsed body.

Knows nothing of what the routes do.
Used by api's routers as FastAPI dependencies.
"""

from __future__ import annotations

import hashlib
import hmac
import random
import time
from collections.abc import AsyncIterator
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from pydantic import ValidationError

from api.errors import InvalidKey, ModelNotFound, WrongFamily, WrongMediaType, from_validation, shown
from api.metrics import Metrics
from config import Settings
from model_manager import ModelInfo, ModelManager
from models import ChatCompletionRequest, CompletionRequest, GenerationFields
from runtime.admission import Admission
from text.token_bytes import TokenBytes, token_bytes_of

RequestModel = TypeVar("RequestModel", bound=GenerationFields)
# The name by which any server of this kind can be asked for its one model.
GENERIC_MODEL = "model"


class Parts:
    """What an app is made of; hangs on app.state.

    Args:
        settings: the options.
        manager: the way to the model.
        endpoints: where it can be asked for something.
    """

    def __init__(self, settings: Settings, manager: ModelManager, endpoints: list[str]) -> None:
        self.settings = settings
        self.manager = manager
        self.endpoints = endpoints
        self.metrics = Metrics(manager)
        self.created = int(time.time())
        # Makes the seeds of requests without one, repeatable with --seed.
        self.seeds = random.Random(settings.seed)
        # Held in memory until they are whole, before a place in the server is taken: they need a bound of their own.
        self.uploads = Admission(settings.max_concurrent, "uploads are being read")

    @property
    def pieces(self) -> TokenBytes:
        """The text of single tokens; raises NotServing before the model is loaded."""
        return token_bytes_of(self.manager.tokenizer)


def get_parts(request: Request) -> Parts:
    """The app's parts."""
    parts: Parts = request.app.state.parts
    return parts


# Async although they wait for nothing: FastAPI runs plain functions in a thread.
async def _parts(request: Request) -> Parts:
    return get_parts(request)


UsesParts = Annotated[Parts, Depends(_parts)]


async def check_key(request: Request) -> bytes:
    """Refuses a request without a valid key; returns the salt that keeps its prefix cache apart from other keys'.

    Raises:
        InvalidKey: keys are configured and the request has none of them.
    """
    keys = get_parts(request).settings.api_key
    if not keys:
        return b""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip().encode() if scheme.lower() == "bearer" else b""
    # Every key is compared in constant time, and all of them always: time must not tell how close a guess is.
    is_valid = [hmac.compare_digest(given, key.encode()) for key in keys]
    if not any(is_valid):
        reason = (
            "no API key was given: send it as Authorization: Bearer KEY" if not given else "the API key is not valid"
        )
        raise InvalidKey(reason)
    return hashlib.sha256(given).digest()


CacheSalt = Annotated[bytes, Depends(check_key)]


async def admit(request: Request) -> AsyncIterator[None]:
    """Holds a place in the server from here until the last byte of the answer has been sent."""
    with get_parts(request).manager.admission():
        yield


async def _read_body(request: Request, model: type[RequestModel]) -> RequestModel:
    """The body as a wire model, for the model that is served.

    Raises:
        CallerError: it is not JSON, not what the model says, or asks for another model.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise WrongMediaType(f"Content-Type is {shown(content_type)}: it must be application/json")
    try:
        body = model.model_validate_json(await request.body())
    except ValidationError as error:
        raise from_validation(error) from None
    check_model(body.model, get_parts(request).settings)
    return body


def check_model(name: str, settings: Settings) -> None:
    """Raises ModelNotFound unless the name is that of the one model."""
    served = settings.model_name
    if name not in (served, GENERIC_MODEL):
        raise ModelNotFound(f"model is {shown(name)}: this server has {shown(served)}", param="model")


def check_reads_text(info: ModelInfo) -> None:
    """Raises WrongFamily for a speech model."""
    if info.family == "speech":
        raise WrongFamily(f"{info.name} transcribes speech: ask it at /v1/audio/transcriptions", param="model")


def check_transcribes(info: ModelInfo) -> None:
    """Raises WrongFamily for any other than a speech model."""
    if info.family != "speech":
        raise WrongFamily(f"{info.name} is no speech model: it cannot transcribe or translate audio", param="model")


async def _read_chat(request: Request) -> ChatCompletionRequest:
    return await _read_body(request, ChatCompletionRequest)


async def _read_completion(request: Request) -> CompletionRequest:
    return await _read_body(request, CompletionRequest)


ChatBody = Annotated[ChatCompletionRequest, Depends(_read_chat)]
CompletionBody = Annotated[CompletionRequest, Depends(_read_completion)]
# To be declared after the body: who sends one slowly must not hold a place that others wait for.
Place = Annotated[None, Depends(admit)]
