"""The tour: every station against a real server, and one clear line where there is none."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from example_client import DEFAULT_AUDIO, DEFAULT_BASE_URL, main
from tests.e2e.serving_tiny import TinyServer, serve, serve_tiny

STATIONS = (
    "Models", "Chat", "Chat, streamed", "Text completion", "Log-probabilities", "Structured output",
    "An error, handled",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServer]:
    directory = tmp_path_factory.mktemp("tour")
    with serve_tiny("llama", directory, served_model_name="org/tiny", api_key=("secret",)) as server:
        yield server


def test_the_tour_visits_every_station(server: TinyServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", server.base_url, "--api-key", "secret"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    for station in STATIONS:
        place = lines.index(station)
        assert lines[place + 1] == "-" * len(station)
        assert lines[place + 2].strip(), station
    assert "org/tiny: LlamaForCausalLM, float32 on cpu, context of 256 tokens" in lines
    assert lines[-1].startswith("NotFoundError: model is")
    assert lines[-1].endswith("(code model_not_found)")
    assert any(line.endswith(" tokens read, 60 written)") or "(stop; " in line for line in lines)
    assert any(line.startswith("{'name': ") for line in lines)
    assert sum("Once upon a time|" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("name", "stations", "said"),
    [
        ("demo-t5", ("Text to text", "Beam search"), "words: 60017 -> sixty thousand and seventeen"),
        (
            "demo-whisper",
            (f"Transcription of {DEFAULT_AUDIO.name}", "Word times", "Transcription, streamed", "Translation"),
            "00:00:00,000 --> ",
        ),
    ],
)
def test_the_tour_shows_what_the_model_knows(
    name: str, stations: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(name) as server:
        assert main(["--base-url", server.base_url]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    for station in ("Models", *stations, "An error, handled"):
        place = lines.index(station)
        assert lines[place + 2].strip(), station
    assert said in shown.out
    assert lines[-1].endswith("(code model_not_found)")


def test_without_a_server_there_is_one_line_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        assert main(["--base-url", url]) == 1
    shown = capsys.readouterr()
    assert shown.err == f"example_client.py: no server at {url}; start one with: ./start.sh --hf-model demo\n"


def test_a_wrong_key_is_said_in_the_servers_words(server: TinyServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", server.base_url, "--api-key", "wrong"]) == 1
    assert capsys.readouterr().err == "example_client.py: the server answered 401: the API key is not valid\n"


def test_the_default_address_is_the_servers_default() -> None:
    from config import Settings

    assert f"http://127.0.0.1:{Settings().port}/v1" == DEFAULT_BASE_URL
