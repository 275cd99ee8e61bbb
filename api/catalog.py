"""What there is and how it is: models, health, readiness, the root, metrics.

Knows nothing of generation.
Mounted by app.py.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from api.deps import Parts, UsesParts, check_model
from runtime.model_loading import ModelInfo

VERSION = "0.1.0"
# Open to everyone: orchestrators have no keys, and these say nothing about requests.
open_router = APIRouter()
router = APIRouter()


@open_router.get("/health")
async def health(parts: UsesParts) -> Response:
    """200 while the process can serve, be it later; 503 when only a restart helps: the engine is dead or hangs."""
    manager = parts.manager
    is_dead = manager.state == "dead"
    status = "dead" if is_dead else "stalled" if manager.is_stalled else manager.state
    body: dict[str, Any] = {"status": status, "num_requests": manager.num_admitted}
    if not is_dead and manager.state != "loading":
        info = manager.info
        body |= {"model": info.name, "family": info.family, "device": info.device}
        body |= {"lane": info.lane, "lane_reason": info.lane_reason, "kv_layout": info.kv_layout} | _placement(info)
        if parts.settings.torch_compile:
            body["compiled_batch_sizes"] = list(manager.stats.compiled_batch_sizes)
            body["compiled_encoder_batch_sizes"] = list(manager.stats.compiled_encoder_batch_sizes)
            body["graph_batch_sizes"] = list(manager.stats.graph_batch_sizes)
    return JSONResponse(body, 503 if status in ("dead", "stalled") else 200)


@open_router.get("/ready")
async def ready(parts: UsesParts) -> Response:
    """200 while requests are taken, 503 while loading or draining."""
    state = parts.manager.state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/")
async def root(parts: UsesParts) -> Response:
    """What this is, and where to go."""
    return JSONResponse(
        {
            "name": "transformers-openai-api",
            "version": VERSION,
            "model": parts.settings.model_name,
            "status": parts.manager.state,
            "endpoints": parts.endpoints,
        }
    )


@router.get("/models")
async def list_models(parts: UsesParts) -> Response:
    """The one model, in a list."""
    return JSONResponse({"object": "list", "data": [_entry(parts)]})


@router.get("/models/{name:path}")
async def retrieve_model(name: str, parts: UsesParts) -> Response:
    """The one model, by its name, which may contain slashes."""
    check_model(name, parts.settings)
    return JSONResponse(_entry(parts))


@router.get("/metrics")
async def metrics(parts: UsesParts) -> Response:
    """Counters, gauges and histograms for Prometheus."""
    return Response(parts.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def _entry(parts: Parts) -> dict[str, Any]:
    """A model as OpenAI lists it, and what it takes to use this one well; raises NotServing before it is loaded."""
    info = parts.manager.info
    entry = {
        "id": parts.settings.model_name,
        "object": "model",
        "created": parts.created,
        "owned_by": "transformers",
        "max_model_len": info.max_model_len,
        "architecture": info.architecture,
        "family": info.family,
        "dtype": info.dtype,
        "device": info.device,
        "lane": info.lane,
        "lane_reason": info.lane_reason,
        "kv_layout": info.kv_layout,
        "num_parameters": info.num_parameters,
        "generation_defaults": dict(info.generation_defaults),
    }
    entry |= _placement(info)
    return entry | {"languages": list(info.languages)} if info.family == "speech" else entry


def _placement(info: ModelInfo) -> dict[str, Any]:
    """Bytes of weights by where they are, of a model that is spread."""
    return {"placement": dict(info.placement)} if info.placement else {}
