"""Our own kernels: compiled once, kept, healed, and done without where they cannot be had."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.model import native_kernels, operators
from engine.model.native_kernels import load_native
from tests import int4_weights
from tests.int4_weights import CAN_COMPILE, random

compiles = pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")


@pytest.fixture
def quick_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that nobody computes with need no optimisation, which is most of what compiling takes."""
    flags = tuple(flag for flag in native_kernels.FLAGS if flag != "-O3")
    monkeypatch.setattr(native_kernels, "FLAGS", ("-O0", *flags))


@compiles
@pytest.mark.usefixtures("quick_to_compile")
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
@pytest.mark.usefixtures("quick_to_compile")
def test_a_directory_that_others_can_write_to_is_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert load_native(shared) is not None
    assert not list(shared.iterdir()) and "can be written to by others" in caplog.text


@compiles
@pytest.mark.usefixtures("quick_to_compile")
def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_native(tmp_path) is not None
    first, *others = native_kernels.SOURCES
    other = tmp_path / "other.cpp"
    other.write_text(first.read_text() + "\n// changed\n")
    monkeypatch.setattr(native_kernels, "SOURCES", (other, *others))
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
        monkeypatch.setattr(native_kernels, "SOURCES", (tmp_path / "source.cpp",))
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


def packed(num_outputs: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """A weight, and its words as oneDNN lays them out, padded with zeros."""
    weight = random(num_outputs, num_columns).bfloat16()
    padded = torch.zeros(-(-num_outputs // 64) * 64, -(-num_columns // 32) * 32, dtype=torch.bfloat16)
    padded[:num_outputs, :num_columns] = weight
    return weight, padded.view(-1, 64, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()


@compiles
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_outputs", "num_columns"), [(64, 32), (36, 70), (192, 128), (577, 96), (10, 2)])
def test_a_packed_weight_is_multiplied_from_its_memory(num_outputs: int, num_columns: int, num_threads: int) -> None:
    weight, words = packed(num_outputs, num_columns)
    bias = random(num_outputs, seed=2).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for num_rows in (0, 1, 2, 5, 6, 7, 16, 23):
            x = random(1, num_rows, num_columns, seed=1).bfloat16()
            exact = x.double() @ weight.double().t()
            for offset, expected in ((None, exact), (bias, exact + bias.double())):
                got = int4_weights.native_kernels().packed_multiply(x, words, offset, num_outputs)
                torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=2**-8)
    finally:
        torch.set_num_threads(before)


@compiles
def test_a_row_does_not_depend_on_those_beside_it() -> None:
    _, words = packed(192, 128)
    kernels, x = int4_weights.native_kernels(), random(23, 128).bfloat16()
    together = kernels.packed_multiply(x, words, None, 192)
    for row in range(23):
        assert torch.equal(kernels.packed_multiply(x[row], words, None, 192), together[row])


@compiles
def test_a_packed_weight_is_never_read_beyond_its_end() -> None:
    _, words = packed(64, 64)
    kernels = int4_weights.native_kernels()
    for x, num_outputs in ((random(2, 96).bfloat16(), 64), (random(2, 64), 64), (random(2, 64).bfloat16(), 65)):
        with pytest.raises(RuntimeError, match="expected bfloat16 of at most 64 columns"):
            kernels.packed_multiply(x, words, None, num_outputs)


def test_every_function_for_compiled_code_is_an_operator_with_a_twin() -> None:
    namespace = getattr(torch.ops, operators.NAMESPACE)
    for name in operators.NATIVE:
        qualified = f"{operators.NAMESPACE}::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeExplicitAutograd")
        # A handle for each tensor, and one more for what is made.
        arguments = getattr(namespace, name).default._schema.arguments
        num_tensors = sum("Tensor" in str(argument.type) for argument in arguments)
        assert native_kernels.declaration(name).count("AtenTensorHandle") == num_tensors + 1
