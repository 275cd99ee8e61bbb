"""The program as a process: what it prints, when it answers, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import main
from config import Settings
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parent.parent
START_S = 120  # a busy machine imports torch slowly


class Process:
    """main.py with some options, its log gathered as it comes."""

    def __init__(self, *options: str) -> None:
        # Only these: variables like PORT or HF_MODEL in the developer's own environment are options here.
        environ = {name: os.environ[name] for name in os.environ if name in ("PATH", "HOME", "SYSTEMROOT", "TEMP")}
        environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.popen = subprocess.Popen(
            [sys.executable, "main.py", "--host", "127.0.0.1", "--port", "0", *options],
            cwd=ROOT,
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        self.lines.extend(iter(self.popen.stderr.readline, ""))

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        """The first line of the log that has the pattern."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            if self.popen.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"no line with {pattern!r} in:\n{''.join(self.lines)}")

    def url(self) -> str:
        """Where it listens, from the moment that it does."""
        return self.wait_for_line(r"listening on (http://127\.0\.0\.1:\d+)")[1]

    def signal(self, number: int) -> None:
        """Sends a signal."""
        self.popen.send_signal(number)

    def exit_code(self) -> int:
        """Waits for the end."""
        code = self.popen.wait(START_S)
        self._reader.join()
        return code

    def end(self) -> None:
        """Makes sure that it has ended."""
        self.popen.kill()
        self.popen.wait()
        self._reader.join()
        assert self.popen.stderr is not None
        self.popen.stderr.close()


StartProcess = Callable[..., Process]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def start() -> Iterator[StartProcess]:
    processes: list[Process] = []

    def begin(*options: str) -> Process:
        processes.append(Process(*options))
        return processes[-1]

    yield begin
    for process in processes:
        process.end()


class Stream(threading.Thread):
    """One streamed chat, read in the background."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__()
        self.url = url
        self.body = {
            "model": "model",
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        self.frames: list[dict[str, Any]] = []
        self.is_done = False
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        """Reads to the end."""
        try:
            with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=self.body, timeout=60) as response:
                assert response.status_code == 200
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.is_done = True
                    elif line.startswith("data: "):
                        self.frames.append(json.loads(line[6:]))
        except Exception as error:
            self.failure = error

    def wait_for_text(self) -> None:
        """Until something was generated."""
        while not any(f.get("choices") and f["choices"][0]["delta"].get("content") for f in list(self.frames)):
            assert self.is_alive(), (self.failure, self.frames)
            time.sleep(0.005)


def status(url: str, path: str) -> int:
    return httpx.get(f"{url}{path}", timeout=30).status_code


def test_it_answers_while_loading_says_what_it_serves_and_drains(start: StartProcess, checkpoint: Path) -> None:
    process = start("--hf-model", str(checkpoint), "--torch-dtype", "float32", "--served-model-name", "tiny")
    url = process.url()
    assert status(url, "/health") == 200
    assert status(url, "/ready") == 503
    process.wait_for_line("ready: ")
    assert status(url, "/ready") == 200
    last = process.lines[-1]
    for words in (
        "tiny",
        "LlamaForCausalLM",
        "float32 on cpu",
        "lane flat",
        "KV in slots, up to",
        "bytes a token",
        f"{url}/v1",
    ):
        assert words in last
    # A stream that takes a while, so that the drain has something to wait for.
    stream = Stream(url, max_tokens=3000)
    stream.wait_for_text()
    process.signal(signal.SIGTERM)
    process.wait_for_line("SIGTERM: 1 requests may finish")
    answer = httpx.post(f"{url}/v1/chat/completions", json={**stream.body, "stream": False}, timeout=30)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "the server is shutting down"
    assert status(url, "/ready") == 503
    assert status(url, "/health") == 200
    stream.join()
    assert stream.failure is None and stream.is_done
    assert stream.frames[-1]["choices"][0]["finish_reason"] == "length"
    assert process.exit_code() == 0
    assert not any(word in line for line in process.lines for word in ("Traceback", "ERROR", "CRITICAL"))


def test_streams_that_outlast_the_shutdown_timeout_end_with_an_error_frame(
    start: StartProcess, checkpoint: Path
) -> None:
    process = start("--hf-model", str(checkpoint), "--torch-dtype", "float32", "--shutdown-timeout", "0.3")
    url = process.url()
    process.wait_for_line("ready: ")
    streams = [Stream(url, max_tokens=90_000) for _ in range(3)]
    for stream in streams:
        stream.wait_for_text()
    process.signal(signal.SIGINT)
    assert process.exit_code() == 0
    for stream in streams:
        stream.join()
        assert stream.failure is None and stream.is_done
        assert "shut down" in stream.frames[-1]["error"]["message"]


def test_a_second_signal_ends_at_once(start: StartProcess, checkpoint: Path) -> None:
    process = start("--hf-model", str(checkpoint), "--torch-dtype", "float32", "--shutdown-timeout", "60")
    url = process.url()
    process.wait_for_line("ready: ")
    stream = Stream(url, max_tokens=90_000)
    stream.wait_for_text()
    process.signal(signal.SIGTERM)
    process.wait_for_line("SIGTERM: 1 requests may finish")
    started = time.monotonic()
    process.signal(signal.SIGTERM)
    assert process.exit_code() == 0
    assert time.monotonic() - started < 2
    stream.join()
    assert stream.failure is not None


def test_a_signal_while_loading_ends_with_exit_code_0(start: StartProcess, checkpoint: Path) -> None:
    process = start("--hf-model", str(checkpoint))
    process.url()
    process.signal(signal.SIGTERM)
    assert process.exit_code() == 0
    assert not any("ready: " in line or "Traceback" in line for line in process.lines)


def test_an_option_that_does_not_fit_ends_the_load_with_one_line_and_exit_code_2(
    start: StartProcess, checkpoint: Path
) -> None:
    process = start("--hf-model", str(checkpoint), "--torch-dtype", "float16", "--accelerator-type", "cpu")
    assert process.exit_code() == 2
    assert process.lines[-1].startswith("main.py: --torch-dtype float16: ")
    assert not any("Traceback" in line for line in process.lines)


def test_a_port_that_is_taken_ends_the_start_with_one_line_and_exit_code_2(start: StartProcess) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start("--port", str(port))
        assert process.exit_code() == 2
    assert len(process.lines) == 1
    assert f"--port {port}: cannot listen there" in process.lines[0]


def test_a_wrong_option_is_one_line_and_exit_code_2(start: StartProcess) -> None:
    process = start("--port", "99999999")
    assert process.exit_code() == 2
    assert process.lines == ["main.py: --port 99999999: should be less than or equal to 65535\n"]


def plan(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs `main.py plan` to its end."""
    kept = {name: os.environ[name] for name in os.environ if name in ("PATH", "HOME", "SYSTEMROOT", "TEMP")}
    return subprocess.run(
        [sys.executable, "main.py", "--host", "0.0.0.0", "plan", *options],  # as a container's entry point has it
        cwd=ROOT, env=kept | {"HF_HUB_OFFLINE": "1"} | environ, capture_output=True, text=True, timeout=START_S,
        check=False,
    )  # fmt: skip


def test_a_plan_of_the_demo_model_tells_what_it_takes_and_serves_nothing() -> None:
    done = plan("--hf-model", "demo", "--port", "1", "--accelerator-type", "cpu")  # a port that only root may have
    assert done.returncode == 0, done.stderr
    model = ROOT / "demo" / "chat" / "model.safetensors"
    parameters = (model.stat().st_size - 2**20, model.stat().st_size)
    found = re.search(r"in memory +[\d.]+ MiB, ([\d,]+) parameters: bfloat16", done.stdout)
    assert found is not None
    assert parameters[0] < 2 * int(found[1].replace(",", "")) < parameters[1]
    for words in ("Qwen3ForCausalLM", "in bfloat16 on cpu", "lane          flat if", "bytes a token", "20 sequences"):
        assert words in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fits: ")
    assert "Traceback" not in done.stderr


def test_a_plan_takes_options_as_serving_does_and_ends_with_exit_code_3_when_it_does_not_fit() -> None:
    given = {"HF_MODEL": "demo", "CONTINUOUS_BATCHING_BATCH_SIZE": "3", "ACCELERATOR_TYPE": "cpu"}
    done = plan("--kv-cache-memory", "900TiB", **given)
    assert done.returncode == 3
    assert "3 sequences" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("does not fit: --kv-cache-memory ")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--hf-model", "some/model-that-is-not-here"], "--hf-model some/model-that-is-not-here: "),
        (["--prot", "80"], "--prot: no such option; did you mean --port?"),
    ],
)
def test_a_mistake_in_a_plan_is_one_line_and_exit_code_2(options: list[str], line: str) -> None:
    done = plan("--loglevel", "ERROR", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"main.py: {line}") and done.stderr.count("\n") == 1


def test_help_names_the_dry_run() -> None:
    done = plan("--help")
    assert done.returncode == 0
    assert "python main.py [plan] [options]" in done.stdout and "exit code 0 when" in done.stdout


def test_defaults_that_may_surprise_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    def said(environ: dict[str, str], **options: Any) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            main._point_out(Settings(**options), environ)
        return caplog.text

    assert "HOSTNAME=elsewhere is no address of this machine: listening on 0.0.0.0" in said({"HOSTNAME": "elsewhere"})
    assert "no --api-key" in said({})
    assert said({"HOSTNAME": "elsewhere"}, host="127.0.0.1") == ""
    assert said({}, api_key=("key",)) == ""
