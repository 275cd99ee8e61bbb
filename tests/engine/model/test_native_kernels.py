"""Our own kernels: compiled once, kept, healed, and done without where they cannot be had."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from engine.model import native_kernels
from engine.model.native_kernels import load_native
from tests import int4_weights
from tests.int4_weights import CAN_COMPILE, random

compiles = pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")


@compiles
def test_they_are_compiled_once_and_a_damaged_library_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "kept"
    assert load_native(directory) is not None
    (library,) = directory.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(native_kernels, "COMPILERS", ())
        assert load_native(directory) is not None, "nothing to compile"
        content = library.read_bytes()
        library.unlink()  # this process has it mapped: the damage is to a new file
        library.write_bytes(content[:1000])
        assert load_native(directory) is None
    assert "is damaged" in caplog.text
    assert load_native(directory) is not None
    assert len(list(directory.iterdir())) == 1


@compiles
def test_a_directory_that_others_can_write_to_is_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert load_native(shared) is not None
    assert not list(shared.iterdir()) and "can be written to by others" in caplog.text


@compiles
def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_native(tmp_path) is not None
    other = tmp_path / "other.cpp"
    other.write_text(native_kernels.SOURCE.read_text() + "\n// changed\n")
    monkeypatch.setattr(native_kernels, "SOURCE", other)
    assert load_native(tmp_path) is not None
    assert len(list(tmp_path.glob("*.so"))) == 2


@pytest.mark.skipif(not native_kernels._has_instructions(), reason="no AVX512-BF16")
@pytest.mark.parametrize(
    ("compilers", "source", "words"),
    [
        ((), None, "no C++ compiler found"),
        (("false",), None, "returned non-zero"),
        (("c++", "g++"), "this is no C++", "error"),
        (("c++", "g++"), 'extern "C" int has_instructions() { return 0; }', "no AVX512-BF16"),
        (("c++", "g++"), 'extern "C" int has_instructions() { return 1; }', "int4_multiply"),
    ],
)
def test_without_them_the_log_says_why(
    compilers: tuple[str, ...],
    source: str | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if source is not None:
        if not CAN_COMPILE:
            pytest.skip("no compiler")
        (tmp_path / "source.cpp").write_text(source)
        monkeypatch.setattr(native_kernels, "SOURCE", tmp_path / "source.cpp")
    monkeypatch.setattr(native_kernels, "COMPILERS", compilers)
    with caplog.at_level(logging.INFO):
        assert load_native(tmp_path / "kept") is None
    assert words in caplog.text
    assert not list((tmp_path / "kept").glob(".*"))


def test_a_cpu_without_the_instructions_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_kernels, "_has_instructions", lambda: False)
    assert load_native(tmp_path / "kept") is None
    assert not (tmp_path / "kept").exists()


@compiles
@pytest.mark.parametrize("num_columns", [32, 96, 160, 256, 896])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 6, 7, 9])
def test_a_bfloat16_weight_is_multiplied_where_it_lies(num_rows: int, num_columns: int) -> None:
    weight = random(36, num_columns).bfloat16()
    x = random(num_rows, num_columns, seed=1).bfloat16()
    got = int4_weights.native_kernels().bf16_multiply(x, weight)
    assert got.dtype == torch.bfloat16
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=2**-8)


@compiles
def test_what_would_read_beyond_a_tensor_is_refused() -> None:
    kernels = int4_weights.native_kernels()
    weight = random(8, 64).bfloat16()
    for x in (random(2, 64), random(2, 32).bfloat16(), random(64, 2).bfloat16().t(), random(2, 64).half()):
        with pytest.raises(RuntimeError, match="expected contiguous bfloat16"):
            kernels.bf16_multiply(x, weight)
