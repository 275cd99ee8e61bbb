"""Streams under real sockets: clients that go, clients that do not read, silence, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from api import answers, sse
from tests.api.conftest import LiveServer, run_async
from tests.api.scripted import says

Live = Callable[..., LiveServer]
WITHIN_S = 2.0


def send(server: LiveServer, body: dict[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
    """A request on a connection of its own, which is left open."""
    data = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **body}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 5}, {"stream": False, "n": 5}]
)
@pytest.mark.parametrize("is_queued", [False, True])
def test_a_client_that_goes_frees_its_sequences(live: Live, body: dict[str, Any], is_queued: bool) -> None:
    server = live()
    server.engine.script = says([65] * 500, None)
    server.engine.step_s = 0.02
    if is_queued:
        server.engine.may_step.clear()  # nothing is ever produced
    connection = send(server, body)
    wait_until(lambda: len(server.engine.running) == body.get("n", 1), 5)
    if not is_queued and body["stream"]:
        assert connection.recv(100)
    connection.close()
    wait_until(lambda: not server.engine.running and server.manager.num_admitted == 0, WITHIN_S)
    assert sorted(server.engine.aborted) == list(range(body.get("n", 1)))


def test_a_client_that_goes_while_nothing_is_said_frees_its_sequences(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "STATUS_WAIT_S", 0.05)
    server = live()
    server.engine.may_step.clear()
    connection = send(server, {"stream": True, "n": 2})
    assert b"200 OK" in connection.recv(1000)
    connection.close()
    wait_until(lambda: not server.engine.running and server.manager.num_admitted == 0, WITHIN_S)


def test_a_reader_that_never_reads_is_given_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SEND_TIMEOUT_S", 0.3)
    monkeypatch.setattr(sse, "PING_S", 0.1)
    server = live()
    server.engine.script = says([65] * 400, None)
    with send(server, {"stream": True, "max_tokens": 400, "logprobs": True, "top_logprobs": 20, "n": 8}):
        wait_until(lambda: server.manager.num_admitted == 1, 5)
        wait_until(lambda: server.manager.num_admitted == 0, 10)


def test_two_hundred_clients_that_go_leave_nothing_behind(live: Live) -> None:
    server = live(max_concurrent=500)
    server.engine.script = says([65] * 500, None)
    server.engine.step_s = 0.01
    for _ in range(2):
        connections = [send(server, {"stream": number % 2 == 0}) for number in range(200)]
        wait_until(lambda: len(server.engine.running) == 200, 10)
        for connection in connections:
            connection.close()
        wait_until(lambda: not server.engine.running and server.manager.num_admitted == 0, 5)
    assert not server.manager._queues
    server.engine.script = says([65], None)
    with send(server, {}) as connection:
        assert b"200 OK" in connection.recv(1000)


def test_silence_is_filled_with_pings_from_acceptance_on(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.1)
    monkeypatch.setattr(answers, "STATUS_WAIT_S", 0.1)
    server = live()
    server.engine.may_step.clear()
    with send(server, {"stream": True}) as connection:
        data = b""
        while data.count(b": ping\n\n") < 3:
            data += connection.recv(1000)
        assert data.startswith(b"HTTP/1.1 200 OK") and b"data: " not in data
        server.engine.may_step.set()
        while not data.endswith(b"0\r\n\r\n"):
            data += connection.recv(1000)
        assert b"data: [DONE]\n\n" in data and "世".encode() in data


def test_a_reader_that_does_not_read_holds_up_nobody_and_loses_nothing(live: Live) -> None:
    server = live()
    num_tokens, num_choices = 400, 8
    server.engine.script = says([65] * num_tokens, None)
    # Seven megabytes each: about as much as the sockets' buffers take at most, and far more than they begin with.
    asked = {"stream": True, "max_tokens": num_tokens, "logprobs": True, "top_logprobs": 20, "n": num_choices}
    slow = [send(server, asked) for _ in range(2)]
    start = time.monotonic()
    with send(server, {"max_tokens": 50}) as quick:
        assert b"200 OK" in quick.recv(1000)
    assert time.monotonic() - start < 5
    wait_until(lambda: not server.engine.running, 10)
    for connection in slow:
        with connection:
            data = bytearray()
            while not data.endswith(b"0\r\n\r\n"):
                piece = connection.recv(2**20)
                assert piece
                data += piece
        frames = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
        entries = [e for f in frames if f["choices"][0]["logprobs"] for e in f["choices"][0]["logprobs"]["content"]]
        assert len(entries) == num_tokens * num_choices


def test_a_stream_that_is_cut_off_at_shutdown_ends_with_an_error_frame_and_done(live: Live) -> None:
    server = live()
    server.engine.script = says([65] * 500, None)
    server.engine.step_s = 0.02
    with send(server, {"stream": True}) as connection:
        data = connection.recv(1000)
        loop = server.manager._loop
        assert loop is not None
        asyncio.run_coroutine_threadsafe(server.manager.drain(0.1), loop).result(10)
        with contextlib.suppress(TimeoutError):
            while b"[DONE]" not in data:
                data += connection.recv(10_000)
    frames = [line for line in data.split(b"\n") if line.startswith(b"data: ")]
    assert frames[-1] == b"data: [DONE]" and json.loads(frames[-2][6:])["error"]["code"] == "unavailable"


def test_a_drain_lets_streams_finish(live: Live) -> None:
    server = live()
    server.engine.script = says([65] * 30, None)
    server.engine.step_s = 0.02
    with send(server, {"stream": True}) as connection:
        data = connection.recv(1000)
        loop = server.manager._loop
        assert loop is not None
        asyncio.run_coroutine_threadsafe(server.manager.drain(10), loop).result(10)
        while b"[DONE]" not in data:
            data += connection.recv(10_000)
    assert b'"finish_reason":"length"' in data


def test_health_answers_quickly_among_many_streams(live: Live) -> None:
    server = live()
    server.engine.script = says([65] * 400, None)
    server.engine.step_s = 0.01

    async def scenario() -> None:
        import httpx

        streams = [send(server, {"stream": True}) for _ in range(64)]
        async with httpx.AsyncClient(base_url=server.url) as client:
            times = []
            for _ in range(50):
                start = time.perf_counter()
                assert (await client.get("/health")).status_code == 200
                times.append(time.perf_counter() - start)
        for stream in streams:
            stream.close()
        assert sorted(times)[-2] < 0.1

    run_async(scenario())
