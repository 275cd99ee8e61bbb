"""Uploads and transcriptions under real sockets: clients that go, uploads without end, forms that are none."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from api import answers, sse
from tests.api.speech import AUDIO, EVENTS, RECORDING, SEGMENTS, SpeechServer, plays, speech_server
from tests.api.test_streams import WITHIN_S, wait_until

BOUNDARY = "xBOUNDARYx"
PATH = "/v1/audio/transcriptions"


@pytest.fixture
def server() -> Iterator[SpeechServer]:
    with speech_server(max_concurrent=500) as server:
        yield server


def form(fields: dict[str, str], audio: bytes = AUDIO) -> bytes:
    parts = [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    file = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return "".join(parts).encode() + file.encode() + audio + f"\r\n--{BOUNDARY}--\r\n".encode()


def connect(server: SpeechServer, *headers: str, path: str = PATH) -> socket.socket:
    """A connection on which the head of a request has been sent."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: multipart/form-data; boundary={BOUNDARY}", *headers]
    connection.sendall("".join(f"{line}\r\n" for line in lines).encode() + b"\r\n")
    return connection


def send(server: SpeechServer, body: bytes) -> socket.socket:
    """A request on a connection of its own, which is left open."""
    connection = connect(server, f"Content-Length: {len(body)}")
    connection.sendall(body)
    return connection


def answer_of(connection: socket.socket) -> tuple[int, dict[str, str]]:
    """Status and error of an answer."""
    data = b""
    while b"}}" not in data:
        piece = connection.recv(10_000)
        assert piece, data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize("fields", [{"stream": "true"}, {}, {"stream": "true", "response_format": "srt"}])
@pytest.mark.parametrize("is_silent", [False, True])
def test_a_client_that_goes_ends_its_transcription(
    server: SpeechServer, fields: dict[str, str], is_silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "STATUS_WAIT_S", 0.05)
    server.manager.script = plays(60.0) if is_silent else plays(RECORDING, SEGMENTS[0], 60.0)
    connection = send(server, form(fields))
    wait_until(lambda: server.manager.num_open == 1 and server.manager.num_admitted == 1, 5)
    if fields:
        assert b"200 OK" in connection.recv(1000)
    connection.close()
    wait_until(lambda: server.manager.num_open == 0 and server.manager.num_admitted == 0, WITHIN_S)


def test_two_hundred_clients_that_go_leave_nothing_behind(server: SpeechServer) -> None:
    server.manager.script = plays(RECORDING, SEGMENTS[0], 60.0)
    connections = [send(server, form({"stream": str(number % 2 == 0)})) for number in range(200)]
    wait_until(lambda: server.manager.num_open == 200, 20)
    for connection in connections:
        connection.close()
    wait_until(lambda: server.manager.num_open == 0 and server.manager.num_admitted == 0, 5)


def test_a_client_that_goes_while_it_uploads_leaves_nothing_behind(server: SpeechServer) -> None:
    connections = [connect(server, "Content-Length: 1000000") for _ in range(20)]
    for connection in connections:
        connection.sendall(form({})[:5000])
        connection.close()
    with send(server, form({})) as connection:
        assert b"200 OK" in connection.recv(1000)
    assert len(server.manager.asked) == 1
    wait_until(lambda: server.manager.num_admitted == 0, WITHIN_S)


def test_who_uploads_slowly_holds_no_place(server: SpeechServer) -> None:
    with connect(server, "Content-Length: 1000000") as connection:
        connection.sendall(form({})[:5000])
        time.sleep(0.1)
        assert server.manager.num_admitted == 0


@pytest.mark.parametrize("response_format", ["json", "srt"])
def test_silence_is_filled_with_pings(
    server: SpeechServer, monkeypatch: pytest.MonkeyPatch, response_format: str
) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.1)
    monkeypatch.setattr(answers, "STATUS_WAIT_S", 0.1)
    server.manager.script = plays(0.6, *EVENTS)
    with send(server, form({"stream": "true", "response_format": response_format})) as connection:
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += connection.recv(1000)
        assert data.count(b": ping\n\n") >= 3 and b"data: [DONE]\n\n" in data


def test_a_drain_lets_transcriptions_finish(server: SpeechServer) -> None:
    server.manager.script = plays(RECORDING, SEGMENTS[0], 0.4, *SEGMENTS[1:], EVENTS[-1])
    with send(server, form({"stream": "true"})) as connection:
        data = connection.recv(1000)
        loop = server.manager._loop
        assert loop is not None
        asyncio.run_coroutine_threadsafe(server.manager.drain(10), loop).result(10)
        while b"[DONE]" not in data:
            data += connection.recv(10_000)
    assert b"transcript.text.done" in data


def test_an_upload_that_is_announced_as_too_large_is_never_sent(server: SpeechServer) -> None:
    limit = 25_000_000 + 2**20
    with connect(server, f"Content-Length: {limit + 1}", "Expect: 100-continue") as connection:
        status, error = answer_of(connection)
    assert status == 413 and error["code"] == "request_too_large"
    with connect(server, f"Content-Length: {limit}", "Expect: 100-continue") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")


def test_an_upload_without_end_is_ended_before_it_is_all_in_memory() -> None:
    piece = b"%x\r\n%s\r\n" % (2**20, bytes(2**20))
    with speech_server(max_audio_size=5_000_000) as server:
        tracemalloc.start()
        with connect(server, "Transfer-Encoding: chunked") as connection:
            head = form({}, b"").partition(f"\r\n--{BOUNDARY}--".encode())[0]
            connection.sendall(b"%x\r\n%s\r\n" % (len(head), head))
            for _ in range(60):  # what comes after the answer is read too, and thrown away
                connection.sendall(piece)
            status, error = answer_of(connection)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert status == 413 and error["param"] == "file" and "5000000" in error["message"]
        assert peak_bytes < 20_000_000 and not server.manager.asked
        with send(server, form({})) as connection:
            assert b"200 OK" in connection.recv(1000)


@pytest.mark.parametrize(
    ("body", "status", "rule"),
    [
        (b"not a form", 400, "no valid multipart/form-data"),
        (b"", 400, "ends before its last boundary"),
        (form({})[:-4], 400, "ends before its last boundary"),
        (form({f"f{n}": "x" for n in range(10_000)}), 400, "more than 64 parts"),
        (form({"x" * 1_000_000: "y"}), 400, "Maximum header size exceeded"),
        (form({"prompt": "x" * 1_100_000}), 413, "more than 1048576 bytes"),
        (form({})[: -len(BOUNDARY) - 6] + form({}), 400, "file is given twice"),
        (form({"a[b]": "1", "a": "2"}), 400, "is given more than once"),
        (form({}, b""), 400, "file is empty"),
    ],
    ids=["text", "nothing", "cut", "parts", "header", "fields", "twice", "clash", "empty"],
)
def test_what_is_no_form_is_refused_quickly(server: SpeechServer, body: bytes, status: int, rule: str) -> None:
    start = time.monotonic()
    with send(server, body) as connection:
        found, error = answer_of(connection)
    assert found == status and rule in error["message"] and time.monotonic() - start < 5
    assert not server.manager.asked and server.manager.num_admitted == 0
