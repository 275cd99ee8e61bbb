"""Where the server listens."""

from __future__ import annotations

import contextlib
import socket

import pytest

from config import Settings, StartupError
from serving import bind, describe, url_of
from tests.scripted_engine import ScriptedEngine, stack_of


def close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


def test_a_name_is_bound_at_all_its_addresses_and_one_port() -> None:
    sockets = bind("localhost", 0)
    with contextlib.ExitStack() as stack:
        stack.callback(close, sockets)
        assert len({each.getsockname()[1] for each in sockets}) == 1
        assert {each.getsockname()[0] for each in sockets} <= {"127.0.0.1", "::1"}


def test_a_taken_port_is_a_startup_error_and_leaves_nothing_open() -> None:
    (first,) = bind("127.0.0.1", 0)
    with first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(StartupError, match=rf"--host 127.0.0.1 --port {port}: cannot listen there: \S"):
            bind("127.0.0.1", port)
    close(bind("127.0.0.1", port))


def test_a_name_that_does_not_exist_is_a_startup_error() -> None:
    with pytest.raises(StartupError, match=r"--host nowhere\.invalid"):
        bind("nowhere.invalid", 0)


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")]
)
def test_the_url_can_be_opened_in_a_browser_of_this_machine(host: str, url: str) -> None:
    sockets = bind(host, 0)
    with contextlib.ExitStack() as stack:
        stack.callback(close, sockets)
        assert url_of(sockets) == f"{url}{sockets[0].getsockname()[1]}"


def test_the_line_before_serving_says_everything() -> None:
    info = stack_of(ScriptedEngine(), Settings(hf_model="a/b")).info
    line = describe(info, "http://127.0.0.1:7088")
    assert line == (
        "ready: a/b, Scripted, 0.0 M parameters, float32 on cpu, lane flat, KV in slots, up to 1.0 GiB "
        "at 64 bytes a token, context 1000, http://127.0.0.1:7088/v1"
    )
