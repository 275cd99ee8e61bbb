"""Compiling for real, in a process of its own; what is kept on disk; and what happens when that goes wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.compile import steps as steps_module
from engine.compile.compiler import Compiler, Failure, Package
from engine.compile.skeleton import take_skeleton
from engine.compile.worker import package_path
from engine.config import CompileConfig
from engine.engine import Engine
from engine.model.runner import FlatModel
from tests import zoo
from tests.engine.compile.inline import quick, settle
from tests.engine.harness import drive, engine_for, greedy, reference, tiny_model, tokens

NUM_TOKENS = 24


def wait(compiler: Compiler) -> Package | Failure:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        result = compiler.take()
        if result is not None:
            return result
        time.sleep(0.02)
    raise AssertionError("the compiler says nothing")


def compiler_with(directory: Path, code: str) -> Compiler:
    """One whose process runs `code` in the place of compiling."""
    model = tiny_model("llama")
    skeleton, _ = take_skeleton(FlatModel(model), model)
    return Compiler(skeleton, directory, is_autotuned=False, worker=(sys.executable, "-c", code))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(steps_module, "time_run", quick)
    yield


@pytest.fixture(scope="module")
def is_compiled(cache: Path) -> bool:
    """Compiles two steps of a llama once; the tests below find them."""
    engine = compiled_llama(cache)
    assert engine.compiled is not None and engine.compiled.sizes == ()  # it answers before anything is compiled
    assert tokens(drive(engine, [greedy(0, zoo.prompt(5), 4)])[0]) == reference("llama", zoo.prompt(5), 4)
    settle(engine, 1)
    assert engine.compiled.num_decided == 1
    engine.close()
    return True


def compiled_llama(cache: Path) -> Engine:
    # As important as the test that waits for it.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steps_module, "Compiler", partial(Compiler, niceness=0))
        return engine_for("llama", compile=CompileConfig(cache, sizes=(2,)))


@pytest.mark.usefixtures("is_compiled")
def test_the_second_start_loads_from_disk_and_gives_the_tokens_of_generate(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(Compiler, "_compile", never)
    engine = compiled_llama(cache)
    settle(engine, 1)
    assert engine.stats().compiled_batch_sizes == (2,)
    prompts = [zoo.prompt(length, seed=length) for length in (5, 40, 9)]
    expected = [reference("llama", prompt, NUM_TOKENS) for prompt in prompts]
    before = dict(torch._dynamo.utils.counters["frames"]) if "torch._dynamo" in sys.modules else {}
    outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts)], stagger=8)
    assert [tokens(outputs[n]) for n in range(3)] == expected
    after = dict(torch._dynamo.utils.counters["frames"]) if "torch._dynamo" in sys.modules else {}
    assert before == after, "something was compiled while it served"


@pytest.mark.usefixtures("is_compiled")
def test_a_damaged_package_is_compiled_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (whole,) = cache.rglob("2-*.pt2")
    content = whole.read_bytes()
    try:
        whole.write_bytes(content[: len(content) // 2])
        model = tiny_model("llama")
        skeleton, _ = take_skeleton(FlatModel(model), model)
        line = f'{{"size": 2, "path": "{whole}", "seconds": 1}}'
        code = f"import sys\nsys.stdin.buffer.read(10)\nprint({line!r})"
        compiler = Compiler(skeleton, cache, is_autotuned=False, worker=(sys.executable, "-c", code))
        assert compiler.directory == whole.parent  # another process's skeleton of the same model is the same
        compiler.request([2])
        assert wait(compiler) == Package(2, whole, 1.0)
        assert "is damaged: removed" in caplog.text
    finally:
        whole.write_bytes(content)
    assert package_path(whole.parent, 2, content) == whole
    end = time.monotonic() + 30
    while [path for path in whole.parent.iterdir() if path.suffix != ".pt2"]:
        assert time.monotonic() < end, "scratch is left behind"
        time.sleep(0.02)


def test_a_compiling_process_that_dies_is_started_once_more(tmp_path: Path) -> None:
    mark = tmp_path / "starts"
    code = f"import sys\nopen({str(mark)!r}, 'a').write('x')\nsys.exit('out of luck')"
    compiler = compiler_with(tmp_path, code)
    compiler.request([1, 2])
    results = [wait(compiler), wait(compiler)]
    assert [result.size for result in results] == [1, 2]
    for result in results:
        assert isinstance(result, Failure) and "ended with code 1: out of luck" in result.reason
    assert mark.read_text() == "xx"


def test_a_model_that_cannot_be_compiled_stays_eager_with_the_compilers_words(tmp_path: Path) -> None:
    code = "import json,sys\nsys.stdin.buffer.read(10)\nprint(json.dumps(dict(size=1, error='CppCompileError: no')))"
    compiler = compiler_with(tmp_path, code)
    woken: list[int] = []
    compiler.wake_with(lambda: woken.append(1))
    compiler.request([1])
    assert wait(compiler) == Failure(1, "CppCompileError: no")
    assert woken == [1]


def test_without_a_cpp_compiler_the_server_stays_eager_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.compile.compiler.shutil.which", lambda _: None)
    engine = engine_for("llama", compile=CompileConfig(tmp_path, sizes=(1,)))
    settle(engine, 1)
    assert "steps of 1 sequences stay eager: no C++ compiler was found (one of g++" in caplog.text
    assert tokens(drive(engine, [greedy(0, zoo.prompt(5), 4)])[0]) == reference("llama", zoo.prompt(5), 4)


def test_closing_ends_the_compiling_process(tmp_path: Path) -> None:
    compiler = compiler_with(tmp_path, "import time\ntime.sleep(600)")
    compiler.request([1])
    end = time.monotonic() + 60
    while compiler._process is None and time.monotonic() < end:
        time.sleep(0.02)
    process = compiler._process
    assert process is not None
    compiler.close()
    assert process.wait(30) != 0
    assert not compiler.has_results()
