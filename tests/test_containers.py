"""Dockerfile, docker-compose.yml and .dockerignore agree with the code: what is copied, passed on, probed, waited for.

Knows nothing of Docker but the files' syntax; asks the compose plugin too, where it is installed.
Runs the health check's command as it stands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path, PurePosixPath

import pytest
import yaml  # type: ignore[import-untyped]

from command_line import Option, take_word
from config import Settings
from tests.container_files import (
    COMPOSE,
    DOCKERFILE,
    ROOT,
    Instruction,
    copied_files,
    environment,
    image,
    is_ignored,
    last,
    seconds,
    services,
    stages,
)
from tests.test_layering import OURS, imports_of

TARGETS = ("cpu", "cuda")
DEFAULTS = Settings()
# What the server itself reads nothing of, but huggingface_hub does.
OF_THE_HUB = {"HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"}
DOWNLOAD_BYTES_PER_S = 4e6
BYTES_OF_7B = 7e9 * 2


def bare_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}


# Dockerfile


def test_each_target_stands_on_a_slim_python_of_one_exact_version_that_the_project_takes() -> None:
    pin = re.search(r"^ARG PYTHON_VERSION=(\d+)\.(\d+)\.(\d+)$", DOCKERFILE, re.MULTILINE)
    assert pin is not None and (int(pin[1]), int(pin[2])) >= (3, 11)
    assert list(stages())[-1] == "cuda", "what is built when no target is named"
    for target in TARGETS:
        assert re.fullmatch(r"python:\$\{PYTHON_VERSION\}-slim-[a-z]+", image(target)[0].words[0])


def test_the_final_layers_install_a_compiler_for_compiled_steps_and_no_other_tool() -> None:
    for target in TARGETS:
        shells = [i.text for i in image(target) if i.keyword == "RUN"]
        (install,) = [text for text in shells if "apt-get install" in text]
        assert re.search(r"install -y --no-install-recommends g\+\+ && rm -rf /var/lib/apt/lists/\*$", install)
        others = " ".join(text for text in shells if text is not install)
        assert not re.search(r"\b(apt|apt-get|pip|gcc|curl|build-essential)\b", others)
    installed = next(i.text for i in stages()["dependencies"] if i.keyword == "RUN")
    assert installed.count("pip install") == installed.count("--only-binary=:all:") == 2


def test_no_address_is_named_and_the_one_of_torch_may_be_given() -> None:
    for name in ("Dockerfile", "docker-compose.yml", ".dockerignore"):
        assert "://" not in (ROOT / name).read_text(encoding="utf-8")
    assert Instruction("ARG", 'TORCH_INDEX_URL=""') in stages()["dependencies"]
    for service in services().values():
        assert service["build"]["args"] == ["TORCH_INDEX_URL"]


@pytest.mark.skipif(os.name != "posix", reason="a shell's commands")
@pytest.mark.parametrize("index", ["", "file:///an/index"])
def test_torch_alone_comes_from_the_index_that_is_given(index: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$@" >>log\n')
    stand_in.chmod(0o755)
    command = next(i.text for i in stages()["dependencies"] if i.keyword == "RUN")
    environ = {"PATH": f"{tmp_path}:{os.defpath}", "TORCH_INDEX_URL": index}
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, env=environ, check=True, timeout=60)
    _, *installs = (tmp_path / "log").read_text().splitlines()
    assert installs[-1].endswith(" -r requirements.txt") and "--index-url" not in installs[-1]
    if index:
        assert re.search(rf" --no-deps --index-url {index} torch==[\d.]+$", installs[0])
    assert len(installs) == (2 if index else 1)


def test_the_server_runs_as_a_user_who_owns_the_cache_and_nothing_else() -> None:
    for target in TARGETS:
        user, _, group = last("USER", target).text.partition(":")
        assert int(user) > 0 and int(group) > 0
        (volume,) = last("VOLUME", target).words
        home = environment(target)["HF_HOME"]
        assert PurePosixPath(home).is_relative_to(volume)
        made = next(i.text for i in image(target) if i.keyword == "RUN" and "useradd" in i.text)
        assert f"--uid {user} " in made
        # Docker gives a new volume the owner that the folder has in the image.
        assert re.search(rf"install -d -o server -g server {volume} {home}$", made)
        assert not any("--chown" in i.text for i in image(target))


def test_the_entry_point_is_the_server_itself_and_listens_outside_the_container() -> None:
    for target in TARGETS:
        python, script, *flags = json.loads(last("ENTRYPOINT", target).text)
        assert (python, script) == ("python", "main.py")
        variables = environment(target) | {"HOSTNAME": "127.0.0.1"}
        settings = Settings.from_sources(flags, variables)
        assert settings.host == "0.0.0.0"
        assert settings.accelerator_type == target and settings.is_given("accelerator_type")
        assert settings.port == int(last("EXPOSE", target).text)
        # What `docker run IMAGE plan --port 1` and `docker run IMAGE --host ::` do.
        assert take_word("plan", [*flags, "plan", "--port", "1"]) == (True, [*flags, "--port", "1"])
        assert Settings.from_sources([*flags, "--host", "::"], variables).host == "::"


def test_everything_the_server_imports_is_copied_and_nothing_it_has_no_use_for() -> None:
    copied = copied_files()
    waiting, seen = ["main"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] not in OURS:
            continue
        seen.add(name)
        path = PurePosixPath(*name.split("."))
        for candidate in (str(path.with_suffix(".py")), str(path / "__init__.py")):
            if (ROOT / candidate).is_file():
                assert copied.get(candidate) == ROOT / candidate, f"{candidate}: .dockerignore or no COPY"
                waiting += imports_of(Path(candidate))
        waiting.append(str(PurePosixPath(name.replace(".", "/")).parent).replace("/", "."))
    assert {"app", "config", "engine.engine", "text.prompt"} <= seen
    tops = {path.partition("/")[0] for path in copied}
    assert tops - {f"{name}.py" for name in OURS} - OURS <= {"LICENSE", "demo"}
    assert not [path for path in copied if "__pycache__" in path or path.startswith("demo/corpus")]
    assert not [path for path in copied if path.startswith("demo/") and path.endswith(".py")]


def test_the_demo_models_are_copied() -> None:
    from runtime.model_loading import DEMO_MODELS

    copied = set(copied_files().values())
    for directory in DEMO_MODELS.values():
        files = {path for path in directory.rglob("*") if path.is_file()}
        assert files <= copied


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".env", ".venv/bin/python", "api/__pycache__/chat.pyc", "tests/test_app.py", "README.md",
        "benchmarks/serve.py", "demo/train_chat.py", "demo/corpus/lists.py", "example_client.py", "model.safetensors",
        "Dockerfile",
    ],
)  # fmt: skip
def test_what_lies_about_in_a_checkout_stays_outside(path: str) -> None:
    assert is_ignored(path)


@pytest.mark.parametrize(
    "path",
    [
        "requirements.txt",
        "main.py",
        "engine/kv/pool.py",
        "engine/model/native_kernels.cpp",
        "demo/chat/model.safetensors",
    ],
)
def test_what_is_needed_is_not_ignored(path: str) -> None:
    assert not is_ignored(path)


def test_the_copied_tree_answers_for_itself(tmp_path: Path) -> None:
    for name, source in copied_files().items():
        if source.suffix == ".py":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", "import main, app, model_manager, serving; print(app.__file__)"],
        cwd=tmp_path, env=bare_environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == (tmp_path / "app.py").resolve()


# The health check


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that answers every GET with a status; gives its port and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1], asked
        finally:
            server.shutdown()
            thread.join()


def check_health(port: str) -> int:
    """Runs the image's own command with this Python; a proxy that goes nowhere must not be asked."""
    python, *rest = last("HEALTHCHECK", "cuda").words
    assert python == "python"
    proxies = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    environ = bare_environment() | proxies
    return subprocess.run(
        [sys.executable, *rest], env=environ | {"PORT": port}, capture_output=True, timeout=60, check=False
    ).returncode


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1), (404, 1)])
def test_the_health_check_asks_whether_the_server_is_ready(status: int, exit_code: int) -> None:
    with answering(status) as (port, asked):
        assert check_health(str(port)) == exit_code
    assert asked == ["/ready"]


def test_the_health_check_fails_where_nobody_listens() -> None:
    with answering(200) as (port, _):
        pass
    assert check_health(str(port)) == 1


def test_the_health_check_asks_at_the_default_port_unless_another_is_given() -> None:
    snippet = last("HEALTHCHECK", "cuda").words[-1]
    assert f"os.environ.get('PORT') or {DEFAULTS.port}" in snippet


def test_the_health_check_waits_for_a_download_and_longer_than_its_own_request() -> None:
    flags = last("HEALTHCHECK", "cuda").flags
    assert seconds(flags["start-period"]) >= BYTES_OF_7B / DOWNLOAD_BYTES_PER_S
    inner = re.search(r"timeout=(\d+)", last("HEALTHCHECK", "cuda").words[-1])
    assert inner is not None and float(inner[1]) < seconds(flags["timeout"]) < seconds(flags["interval"])


# docker-compose.yml


def test_every_option_is_passed_on_when_it_is_set_and_left_alone_when_not() -> None:
    variables = {Option(name, "", "").variable for name in Settings.model_fields}
    # In the operator's shell it is the name of another machine; --host is given instead.
    variables -= {"HOSTNAME"}
    for service in services().values():
        assert set(service["environment"]) == variables | OF_THE_HUB
        assert len(service["environment"]) == len(set(service["environment"]))
        assert Settings.from_sources(service["command"], {"HOSTNAME": "127.0.0.1"}).host == "0.0.0.0"


def test_each_service_builds_a_target_and_starts_alone() -> None:
    assert {name: service["build"]["target"] for name, service in services().items()} == {"gpu": "cuda", "cpu": "cpu"}
    for name, service in services().items():
        assert service["profiles"] == [name]
        assert service["build"]["context"] == "."
        assert service["init"] is True


def test_the_gpu_is_reserved_for_one_service_only() -> None:
    devices = services()["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert "deploy" not in services()["cpu"]


@pytest.mark.parametrize("drain", ["", "0", "5.5", "600"])
def test_docker_waits_longer_than_the_server_drains(drain: str) -> None:
    from serving import LAST_BYTES_S

    for service in services(SHUTDOWN_TIMEOUT=drain).values():
        grace = seconds(service["stop_grace_period"])
        assert grace >= (float(drain) if drain else DEFAULTS.shutdown_timeout) + LAST_BYTES_S + 30


def test_port_cache_and_memory_are_those_of_the_image_and_can_be_given() -> None:
    (volume,) = last("VOLUME", "cuda").words
    named = yaml.safe_load(COMPOSE)["volumes"]
    for service in services().values():
        assert service["ports"] == [f"{DEFAULTS.port}:{DEFAULTS.port}"]
        (name, _, target) = service["volumes"][0].partition(":")
        assert name in named and target == volume
        assert service["mem_limit"] == "24g"
    for service in services(PORT="8000", MEM_LIMIT="2g").values():
        assert (service["ports"], service["mem_limit"]) == (["8000:8000"], "2g")


def test_compose_leaves_the_probe_to_the_image_and_waits_for_a_download() -> None:
    for service in services().values():
        health = service["healthcheck"]
        assert "test" not in health
        assert seconds(health["start_period"]) >= BYTES_OF_7B / DOWNLOAD_BYTES_PER_S
        flags = last("HEALTHCHECK", "cuda").flags
        for name in ("start_period", "interval", "timeout"):
            assert health[name] == flags[name.replace("_", "-")]


def has_compose() -> bool:
    docker = shutil.which("docker")
    return (
        docker is not None
        and not subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60, check=False).returncode
    )


def test_compose_itself_reads_the_file_so() -> None:
    if not has_compose():
        pytest.skip("no docker compose here")
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_CONFIG") if name in os.environ}
    given = {"HF_MODEL": "demo", "PORT": "8000", "SHUTDOWN_TIMEOUT": "120", "COMPOSE_DISABLE_ENV_FILE": "1"}
    done = subprocess.run(
        ["docker", "compose", "--profile", "*", "config", "--format", "json"],
        cwd=ROOT, env=kept | given, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    read = json.loads(done.stdout)["services"]
    assert set(read) == {"gpu", "cpu"}
    for service in read.values():
        set_ones = {name: value for name, value in service["environment"].items() if value is not None}
        assert set_ones == {name: given[name] for name in ("HF_MODEL", "PORT", "SHUTDOWN_TIMEOUT")}
        assert seconds(service["stop_grace_period"]) == 180
        assert (service["ports"][0]["target"], service["ports"][0]["published"]) == (8000, "8000")
        assert int(service["mem_limit"]) == 24 * 2**30


def test_the_readme_names_services_and_variables_that_exist() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Docker\n")[1].split("\n## ")[0]
    named = re.findall(r"docker compose (?:up|build) (\w+)", section)
    assert set(named) == set(services())
    known = {*services()["cpu"]["environment"], "TORCH_INDEX_URL", "MEM_LIMIT"}
    assert set(re.findall(r"\b([A-Z]+_[A-Z_]+|PORT)\b", section)) <= known
