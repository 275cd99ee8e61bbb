"""The walls between the rooms: who may import whom, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The doors above the rooms; the rest of the root belongs to the door that uses it.
OUTSIDE = {"tests", "benchmarks", "demo", "scripts"}
SOURCES = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.py")
    if not any(part.startswith(".") or part in OUTSIDE for part in path.relative_to(ROOT).parts)
)
OURS = {path.parts[0].removesuffix(".py") for path in SOURCES}
# What each room may use of ours, itself aside; leaves use nothing that another layer made.
ALLOWED = {
    "engine": set(),
    "text": set(),
    "audio": set(),
    "models": set(),
    "command_line": set(),
    "config": {"command_line"},
    "runtime": {"audio", "config", "engine", "text"},
    "model_manager": {"config", "engine", "runtime", "text"},
    "api": {"audio", "config", "engine", "model_manager", "models", "runtime", "text"},
    "app": {"api", "audio", "config", "engine", "model_manager", "models", "text"},
    "serving": {"config", "model_manager"},
    "main": {"app", "command_line", "config", "model_manager", "runtime", "serving"},
    "example_client": set(),
}  # fmt: skip
NO_TORCH = ("engine/errors.py", "engine/config.py", "engine/sequence.py", "engine/batch.py", "engine/scheduler.py")
NO_TORCH_KV = (
    "engine/kv/accounting.py",
    "engine/kv/pool.py",
    "engine/kv/prefix.py",
    "engine/kv/manager.py",
    "engine/kv/states.py",
    "engine/kv/paged_pool.py",
    "engine/kv/paged_manager.py",
    "engine/pacing.py",
    "engine/pipeline.py",
)
# What engine/ must not know of at all.
NOT_IN_ENGINE = {"fastapi", "starlette", "pydantic", "tokenizers", "uvicorn", "sse_starlette", "asyncio"}
# Waveforms need no tensors, and no library that opens files by name stands between an upload and its samples.
NOT_IN_AUDIO = {"torch", "transformers", "tokenizers", "asyncio", "fastapi", "starlette", "pydantic", "subprocess"}
# What is slow to import, and so only imported inside functions of the modules that every start imports.
SLOW = {"torch", "transformers", "tokenizers", "numpy"}
MAY_BE_SLOW = {"engine", "text", "audio"}


def imports_of(path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """Full names of the modules a file imports; `only_at_import` leaves out functions and TYPE_CHECKING blocks."""
    nodes: list[ast.AST] = [ast.parse((ROOT / path).read_text())]
    while nodes:
        for node in ast.iter_child_nodes(nodes.pop()):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                yield node.module or ""
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            is_deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            )
            if not (only_at_import and is_deferred):
                nodes.append(node)


def tops(names: Iterator[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = path.parts[0].removesuffix(".py")
    assert room in ALLOWED, f"{room} is new: say here what it may import"
    used = tops(imports_of(path)) & OURS - {room}
    assert used <= ALLOWED[room], f"{path} imports {sorted(used - ALLOWED[room])}"


def test_rooms_never_import_in_a_circle() -> None:
    for room, below in ALLOWED.items():
        seen, waiting = set(), list(below)
        while waiting:
            name = waiting.pop()
            assert name != room, f"{room} imports itself in a circle"
            if name not in seen:
                seen.add(name)
                waiting += ALLOWED[name]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "engine"], ids=str)
def test_the_engine_knows_no_text_and_no_http(path: Path) -> None:
    assert not tops(imports_of(path)) & NOT_IN_ENGINE
    assert not {name for name in imports_of(path) if name.startswith("transformers.tokenization")}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "audio"], ids=str)
def test_audio_knows_no_tensors_and_no_http(path: Path) -> None:
    assert not tops(imports_of(path)) & NOT_IN_AUDIO


def reached_from(start: str) -> set[str]:
    """Everything a module of the engine imports when it is imported, ours followed."""
    seen: set[str] = set()
    waiting = [start.removesuffix(".py").replace("/", ".")]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = Path(*name.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if (ROOT / candidate).is_file():
                waiting += imports_of(candidate, only_at_import=True)
    return seen


@pytest.mark.parametrize("path", [*NO_TORCH, *NO_TORCH_KV])
def test_accounting_and_scheduling_need_no_torch(path: str) -> None:
    assert (ROOT / path).is_file()
    assert not {name.partition(".")[0] for name in reached_from(path)} & SLOW


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] not in MAY_BE_SLOW], ids=str)
def test_the_doors_import_nothing_slow_when_they_are_imported(path: Path) -> None:
    assert not tops(imports_of(path, only_at_import=True)) & SLOW


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_the_environment_is_read_in_main_and_config_only(path: Path) -> None:
    if str(path) in ("main.py", "config.py"):
        return
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        is_environment = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
        assert not is_environment, f"{path}:{getattr(node, 'lineno', 0)} reads the environment"


def test_nobody_has_a_module_for_everything() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc", "common")]
