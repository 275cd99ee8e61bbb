"""The HTTP server around the application: where it listens, how it ends, and its word when the model is ready.

Knows nothing of routes or requests.
Called by main.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn

from config import Settings, StartupError
from model_manager import ModelInfo, ModelManager

logger = logging.getLogger(__name__)

# Clients and balancers keep connections for up to a minute; a server that closes first breaks the request on its way.
KEEP_ALIVE_S = 65
# After the drain nobody is owed anything more: this is for readers too slow to take what was already written for them.
LAST_BYTES_S = 3


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of `host`, all at one port.

    Raises:
        StartupError: an address is not this machine's, or the port is taken.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            bound = socket.socket(family, kind, protocol)
            sockets.append(bound)
            if os.name == "posix":  # elsewhere it would let two servers share the port
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # else it takes the IPv4 port too, and the next bind fails
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind((address[0], sockets[0].getsockname()[1] or port, *address[2:]))
    except OSError as error:
        for bound in sockets:
            bound.close()
        reason = error.strerror or error
        raise StartupError(f"--host {host} --port {port}: cannot listen there: {reason}") from error
    return sockets


def url_of(sockets: list[socket.socket]) -> str:
    """An address at which a browser of this machine reaches the sockets."""
    host, port = sockets[0].getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def describe(info: ModelInfo, url: str) -> str:
    """The line before serving: everything an operator would otherwise have to ask for."""
    millions = info.num_parameters / 1e6
    size = f"{millions / 1e3:.1f} B" if millions >= 1000 else f"{millions:.1f} M"
    gib = info.kv_budget_bytes / 2**30
    places = ", ".join(f"{num_bytes / 2**30:.1f} GiB on {name}" for name, num_bytes in info.placement.items())
    return (
        f"ready: {info.name}, {info.architecture}, {size} parameters, {info.dtype} on {info.device}"
        f"{f' ({places})' if places else ''}, lane {info.lane}, "
        f"KV in {info.kv_layout}, up to {gib:.1f} GiB at {info.kv_bytes_per_token} bytes a token, "
        f"context {info.max_model_len}, {url}/v1"
    )


class Server(uvicorn.Server):
    """Listens while the model loads; ends in order at the first signal, at once at the second.

    Args:
        app: the ASGI application, which starts and closes the manager.
        manager: tells when the model is ready, and drains.
        settings: for the time a drain may take.
    """

    def __init__(self, app: Any, manager: ModelManager, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                ws="none",
                loop="asyncio",  # the same on all systems, whatever else is installed
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=LAST_BYTES_S,
            )
        )
        self.failure: BaseException | None = None  # what loading raised
        self._manager = manager
        self._drain_s = settings.shutdown_timeout
        self._profiles = settings.torch_profiling
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_ending = False
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until told to end."""
        self._loop = asyncio.get_running_loop()
        if self._profiles and hasattr(signal, "SIGUSR1"):  # there is none on Windows
            self._loop.add_signal_handler(signal.SIGUSR1, self._manager.profile_again)
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen; the model loads meanwhile."""
        await super().startup(sockets)
        self._tasks.append(asyncio.create_task(self._announce(url_of(sockets or []))))

    async def _announce(self, url: str) -> None:
        logger.info("listening on %s while the model loads", url)
        try:
            info = await self._manager.wait_until_loaded()
        except Exception as error:
            self.failure = error
            self._is_ending = True
            self.should_exit = True
        else:
            logger.info("%s", describe(info, url))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes SIGINT and SIGTERM: requests that run may finish, unless a second signal comes."""
        if self._is_ending:
            os._exit(0)
        self._is_ending = True
        assert self._loop is not None  # signals come here only while serving
        self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, signal_name: str) -> None:
        self._tasks.append(asyncio.create_task(self._drain(signal_name)))

    async def _drain(self, signal_name: str) -> None:
        logger.info("%s: %d requests may finish within %g s", signal_name, self._manager.num_admitted, self._drain_s)
        # uvicorn stops listening only after this: until then new requests are told 503 instead of being hung up on.
        await self._manager.drain(self._drain_s)
        self.should_exit = True
