"""start.sh and the scripts beside it: what is installed, when, and what main.py is given."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Parser

ROOT = Path(__file__).parent.parent
SCRIPTS = ["start.sh", "scripts/venv.sh", "scripts/test", "scripts/lint", "scripts/check", ".ci/run"]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="bash scripts")

# Stands for Python: notes what it is asked to do, and makes a virtual environment by copying itself.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *"-m venv"*) mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python"; echo "venv" >>"$LOG" ;;
  *"pip install"*) shift 4; echo "pip $*" >>"$LOG"; exit "${PIP_EXIT:-0}" ;;
  *"pip --version"*) exit 0 ;;
  "--version") echo "Python 3.12.0" ;;
  -c*version_info*) exit "${TOO_OLD:-0}" ;;
  -c*) exit 1 ;;
  *) shift; printf '<%s>' "$@"; echo ;;
esac
"""


class Checkout:
    """A copy of the scripts with a stand-in for Python."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in [*SCRIPTS, "requirements.txt", "tests/requirements.txt"]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        self.python = root / "stand-in"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.log = root / "log"

    def run(self, *command: str, cwd: str = "/", **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs a script with a bare environment, from another directory."""
        environment = {"PATH": os.defpath, "LOG": str(self.log), "PYTHON": str(self.python), **environ}
        return subprocess.run(
            [str(self.root / command[0]), *command[1:]],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def done(self) -> list[str]:
        """What was done since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def torch_pin() -> str:
    found = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_first_start_installs_and_later_ones_do_not(checkout: Checkout) -> None:
    first = checkout.run("start.sh", "--hf-model", "demo")
    assert (first.returncode, first.stdout) == (0, "<--hf-model><demo>\n")
    assert checkout.done() == ["venv", "pip -r requirements.txt"]
    second = checkout.run("start.sh")
    assert (second.returncode, second.stdout) == (0, "<>\n")
    assert checkout.done() == []


def test_arguments_arrive_as_they_were_written(checkout: Checkout) -> None:
    arguments = ["--api-key", "a b", "--served-model-name", "*", "--seed", "-1", ""]
    assert checkout.run("start.sh", *arguments).stdout == "".join(f"<{a}>" for a in arguments) + "\n"


def test_the_exit_code_is_the_server_s(checkout: Checkout) -> None:
    checkout.run("start.sh")
    python = checkout.root / ".venv" / "bin" / "python"
    python.write_text("#!/usr/bin/env bash\nexit 2\n")
    assert checkout.run("start.sh", "--nonsense").returncode == 2


def test_changed_requirements_are_installed(checkout: Checkout) -> None:
    checkout.run("start.sh")
    checkout.done()
    requirements = checkout.root / "requirements.txt"
    # A text that begins like the installed one: only its last character is missing.
    requirements.write_text(requirements.read_text().rstrip()[:-1])
    checkout.run("start.sh")
    assert checkout.done() == ["pip -r requirements.txt"]


def test_an_installation_that_failed_is_tried_again(checkout: Checkout) -> None:
    failed = checkout.run("start.sh", PIP_EXIT="1")
    assert failed.returncode != 0 and failed.stdout == ""
    checkout.done()
    assert checkout.run("start.sh").returncode == 0
    assert checkout.done() == ["pip -r requirements.txt"]


@pytest.mark.parametrize("way", ["two words", "one word", "variable"])
def test_torch_comes_from_the_index_that_was_given(way: str, checkout: Checkout) -> None:
    url = "file:///some/index"
    arguments = {"two words": ["--torch-index", url], "one word": [f"--torch-index={url}"], "variable": []}[way]
    environ = {"TORCH_INDEX_URL": url} if way == "variable" else {}
    started = checkout.run("start.sh", *arguments, "--port", "1", **environ)
    assert started.stdout == "<--port><1>\n"
    torch = f"pip --force-reinstall --no-deps --index-url {url} torch=={torch_pin()}"
    assert checkout.done() == ["venv", torch, "pip -r requirements.txt"]
    checkout.run("start.sh", *arguments, **environ)
    checkout.run("start.sh")  # without: torch stays
    assert checkout.done() == []
    checkout.run("start.sh", "--torch-index", "file:///other")
    assert checkout.done()[0].endswith(f"--index-url file:///other torch=={torch_pin()}")


def test_an_index_without_an_address_is_refused(checkout: Checkout) -> None:
    refused = checkout.run("start.sh", "--torch-index")
    assert (refused.returncode, checkout.done()) == (2, [])
    assert "--torch-index: needs an address" in refused.stderr


def test_without_a_suitable_python_it_says_so(checkout: Checkout) -> None:
    # Nothing but coreutils on the path: whatever Python this machine has must not be found.
    tools = checkout.root / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname", "env", "rm", "uname"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    refused = checkout.run("start.sh", TOO_OLD="1", PATH=str(tools))
    assert refused.returncode == 1
    assert "Python 3.11 or newer is needed" in refused.stderr


def test_the_tests_have_their_own_stamp_in_the_same_environment(checkout: Checkout) -> None:
    for command in ("scripts/test", ".ci/run"):
        ran = checkout.run(command, "tests/test_one.py")
        assert ran.returncode == 0
    assert ran.stdout.startswith("<pytest>")
    assert checkout.done() == ["venv", "pip -r tests/requirements.txt"]
    checkout.run("start.sh")
    assert checkout.done() == ["pip -r requirements.txt"]  # quick: everything is there already


def test_a_real_environment_is_made_once_and_quick_to_start_again(checkout: Checkout) -> None:
    (checkout.root / "requirements.txt").write_text("# nothing\n")
    (checkout.root / "main.py").write_text("import sys; print(sys.prefix, sys.argv[1:])\n")
    first = checkout.run("start.sh", "--x", PYTHON=sys.executable)
    assert first.returncode == 0, first.stderr
    # venv's Python says so itself; pip may print above.
    assert first.stdout.splitlines()[-1] == f"{checkout.root / '.venv'} ['--x']"
    started = time.monotonic()
    second = checkout.run("start.sh", PYTHON="/nowhere")
    assert second.stdout == f"{checkout.root / '.venv'} []\n"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_bash_and_executable(name: str) -> None:
    path = ROOT / name
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK) or name == "scripts/venv.sh"  # which is only read by the others


@pytest.mark.parametrize("name", [*SCRIPTS, "start.ps1", "requirements.txt", "tests/requirements.txt"])
def test_no_address_of_an_index_is_built_in(name: str) -> None:
    assert "://" not in (ROOT / name).read_text(encoding="ascii")


def test_powershell_finds_the_same_torch() -> None:
    script = (ROOT / "start.ps1").read_text(encoding="ascii")
    pattern = re.search(r"-Pattern '(\^torch[^']+)'", script)
    assert pattern is not None
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [found[1] for line in lines if (found := re.search(pattern[1], line))] == [torch_pin()]


def mistakes(script: str) -> list[str]:
    """What a grammar of PowerShell 5.1 does not understand, and operators that came after it."""
    source = script.encode()
    tree = Parser(Language(tree_sitter_powershell.language())).parse(source)
    found, waiting = [], [tree.root_node]
    while waiting:
        node = waiting.pop()
        if node.is_error or node.is_missing:
            found.append(f"line {node.start_point.row + 1}: {source[node.start_byte : node.end_byte].decode()}")
        # The grammar knows these two, Windows PowerShell does not.
        if node.type in ("&&", "||"):
            found.append(f"line {node.start_point.row + 1}: {node.type}")
        waiting += node.children
    return found


def test_start_ps1_is_valid_in_windows_powershell() -> None:
    script = (ROOT / "start.ps1").read_text(encoding="ascii")  # 5.1 would read anything else as another code page
    assert mistakes(script) == []
    assert "Write-Host" in script and max(len(line) for line in script.splitlines()) <= 120


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if (-not $installed", "if -not $installed"),  # no parenthesis
        ("    Pop-Location\n}", "    Pop-Location\n"),  # no brace
        ("'Continue'", "'Continue"),  # no quote
        ("$program, $option = ", "$program = $option ?? "),  # of 7
        ("{ return $false }", "{ return $true ? 1 : 0 }"),  # of 7
        ("Pop-Location\n", "Pop-Location && exit\n"),  # of 7
    ],
)
def test_a_mistake_in_start_ps1_would_be_noticed(right: str, wrong: str) -> None:
    script = (ROOT / "start.ps1").read_text(encoding="ascii")
    assert right in script
    assert mistakes(script.replace(right, wrong, 1))


def test_both_start_scripts_try_the_same_pythons_and_ask_for_the_same_version() -> None:
    powershell = (ROOT / "start.ps1").read_text(encoding="ascii")
    bash = (ROOT / "scripts" / "venv.sh").read_text(encoding="ascii")
    asked = [re.findall(r"sys\.version_info < \((\d+), (\d+)\)", script) for script in (powershell, bash)]
    assert asked[0] == asked[1] == [("3", "11")]
    named = re.findall(r"'py -3\.(\d+)'", powershell)
    assert named == [n for n in re.findall(r"python3\.(\d+)", bash) if n in named] and len(named) >= 3


@pytest.mark.skipif(shutil.which("pwsh") is None, reason="needs PowerShell")
def test_powershell_can_read_start_ps1() -> None:
    read = "[scriptblock]::Create((Get-Content -Raw start.ps1)) | Out-Null"
    subprocess.run(["pwsh", "-NoProfile", "-Command", read], cwd=ROOT, check=True)
