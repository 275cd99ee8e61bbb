"""README.md is true: every command and program in it runs, its table of options is that of config.py, its paths exist.

Knows nothing of what the answers should say: a tiny random model answers where the demo model is not there.
Run as `python -m tests.test_readme` it writes the table of options anew.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from config import Settings, _describe  # the one description of an option that --help shows too
from runtime.model_loading import DEMO_MODELS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN = "<!-- options: made by `python -m tests.test_readme`, which a test compares with config.py -->\n"
END = "<!-- end of options -->"
START_S = 180  # a busy machine imports torch slowly
PORT_IN_README = "7088"


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    text: str

    @property
    def starts_a_server(self) -> bool:
        return self.text.startswith("./start.sh")


def blocks(text: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


BLOCKS = blocks(README.read_text(encoding="utf-8"))
STARTS = [block for block in BLOCKS if block.starts_a_server]


def clients() -> list[tuple[int, Block]]:
    """Each block that asks a server, and which of STARTS it asks: the one started last before it."""
    found = []
    number = -1
    for block in BLOCKS:
        if block.starts_a_server:
            number += 1
        elif block.language in ("bash", "python"):
            found.append((number, block))
    return found


CLIENTS = clients()


def options_table() -> str:
    """The table of options, from config.py."""
    lines = ["| option | variable | default | meaning |", "|---|---|---|---|"]
    for name in Settings.model_fields:
        option = _describe(name)
        meaning = option.meaning.replace("|", "\\|")
        lines.append(f"| `{option.flag}` | `{option.variable}` | {option.default} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    head, rest = text.split(BEGIN)
    return head + BEGIN + options_table() + END + rest.split(END, 1)[1]


# The tree as a new user has it, with this Python as its .venv


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout") / "project"
    skipped = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "results")
    shutil.copytree(ROOT, root, ignore=skipped)
    # The whole suite within itself would not end: one quick file stands for it.
    shutil.rmtree(root / "tests")
    (root / "tests").mkdir()
    for name in ("__init__.py", "conftest.py", "requirements.txt", "text/__init__.py", "text/test_stop.py"):
        (root / "tests" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests" / name, root / "tests" / name)
    if not (root / "demo" / "chat" / "model.safetensors").is_file():
        from tests.checkpoints import write_checkpoint

        write_checkpoint(root / "demo" / "chat", max_position_embeddings=2048)
    pretend_installed(root)
    return root


def pretend_installed(root: Path) -> None:
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    runtime = (root / "requirements.txt").read_text()
    tests = (root / "tests" / "requirements.txt").read_text()
    (root / ".venv" / "installed-requirements.txt").write_text(f"{runtime}end\n")
    (root / ".venv" / "installed-tests-requirements.txt").write_text(f"{runtime}{tests}end\n")


def environment(root: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return kept | {
        "PATH": f"{root / '.venv' / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A block that starts a server, run as it stands; only the port is another."""

    def __init__(self, block: Block, root: Path) -> None:
        self.port = free_port()
        self.popen = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", f"exec {block.text}"],
            cwd=root,
            env=environment(root) | {"PORT": str(self.port), "HOSTNAME": "127.0.0.1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        self.log.extend(iter(self.popen.stderr.readline, ""))

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not any("ready: " in line for line in list(self.log)):
            assert self.popen.poll() is None and time.monotonic() < deadline, "".join(self.log)
            time.sleep(0.05)

    def end(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(60)
        finally:
            self.popen.kill()
            self.popen.wait()
            self._reader.join()
            assert self.popen.stderr is not None
            self.popen.stderr.close()


class Servers:
    """One server at a time: the one that was asked for last."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._number = -1
        self._running: Server | None = None

    def get(self, number: int) -> Server:
        if self._running is None or number != self._number:
            self.end()
            self._number, self._running = number, Server(STARTS[number], self._root)
            self._running.wait_until_ready()
        return self._running

    def end(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            assert running.end() == 0


@pytest.fixture(scope="module")
def servers(checkout: Path) -> Iterator[Servers]:
    servers = Servers(checkout)
    try:
        yield servers
    finally:
        servers.end()


@pytest.mark.skipif(os.name != "posix", reason="the commands are those of a POSIX shell")
@pytest.mark.parametrize(
    ("number", "block"), CLIENTS, ids=lambda value: getattr(value, "text", "").split("\n", 1)[0][:40]
)
def test_every_command_and_program_runs(number: int, block: Block, servers: Servers, checkout: Path) -> None:
    if "curl" in block.text and shutil.which("curl") is None:
        pytest.skip("no curl here")
    server = servers.get(number)
    text = block.text.replace(PORT_IN_README, str(server.port))
    text = text.replace("example_client.py", f"example_client.py --base-url http://127.0.0.1:{server.port}/v1")
    command = (
        ["bash", "-euo", "pipefail", "-c", text] if block.language == "bash" else ["python", "-W", "error", "-c", text]
    )
    done = subprocess.run(
        command, cwd=checkout, env=environment(checkout), capture_output=True, text=True, timeout=START_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout


def test_there_is_something_to_run_and_nothing_that_no_test_runs() -> None:
    assert [start.text for start in STARTS] == [f"./start.sh --hf-model {name}\n" for name in DEMO_MODELS]
    assert len(CLIENTS) >= 10
    assert {number for number, _ in CLIENTS} == {0, 1, 2}
    assert {block.language for block in BLOCKS} == {"bash", "python", "powershell", "text"}
    assert [block.text for block in BLOCKS if block.language == "powershell"] == [".\\start.ps1 --hf-model demo\n"]
    assert (ROOT / "start.ps1").is_file()


def test_the_table_of_options_is_that_of_the_settings() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python -m tests.test_readme"
    assert text.count("\n| `--") == len(Settings.model_fields)


def test_every_option_that_the_text_names_exists() -> None:
    others = {"--help", "--base-url", "--rm", "--quick"}  # of the example client, docker and the GPU benchmark
    known = {_describe(name).flag for name in Settings.model_fields} | others
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README.read_text(encoding="utf-8")))
    assert named - known == set()


def test_every_path_that_the_text_names_exists() -> None:
    text = README.read_text(encoding="utf-8")
    tree = next(block.text for block in BLOCKS if block.language == "text")
    in_tree = re.findall(r"(?<![\w/.])([a-z_]+(?:\.py|/))(?=[\s,])", tree)
    assert len(in_tree) > 15
    in_engine = {"kv/", "model/", "sampling/", "compile/", "graphs/"}
    linked = [path for path in re.findall(r"\]\(([^)#:]+)\)", text) if not path.startswith("http")]
    in_prose = re.findall(r"`((?:api|text|engine|benchmarks|scripts)/[\w./]+|[\w]+\.(?:py|sh|ps1))`", text)
    for path in [*(path for path in in_tree if path not in in_engine), *linked, *in_prose]:
        assert (ROOT / path).exists(), path
    for path in in_engine:
        assert (ROOT / "engine" / path).is_dir()
    shown = {path.name + "/" for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert shown <= set(in_tree), "a folder that the tree does not show"


def test_every_metric_that_the_text_names_exists_and_the_other_way_round() -> None:
    from api.metrics import PREFIX, Metrics
    from engine.sequence import EngineStats

    class Manager:
        stats = EngineStats()
        num_audio_windows = 0

    exposed = Metrics(Manager()).text().decode()  # type: ignore[arg-type]  # all that it asks of a manager
    kinds = dict(re.findall(rf"# TYPE {PREFIX}(\w+) (\w+)", exposed))
    section = README.read_text(encoding="utf-8").split("## Metrics")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_0-9]{8,})(?:\{\w+\})?`", section)) - {"transformers_openai"}
    assert named == {name for name in kinds if not name.endswith("_created")}


def test_every_field_that_the_text_says_works_is_a_field() -> None:
    from models import ChatCompletionRequest, CompletionRequest, TranscriptionBody

    section = README.read_text(encoding="utf-8").split("## What works")[1].split("Every path")[0]
    known = {"messages", "file", "generate"}
    for model in (ChatCompletionRequest, CompletionRequest, TranscriptionBody):
        known |= set(model.model_fields)
    named = set(re.findall(r"`([a-z_]+)(?:\.[a-z_]+)?`", section))
    assert named - known == set()


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
