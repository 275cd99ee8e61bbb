"""Every kernel gives what the plain dequantised weight gives; layouts are found out, and repacking rounds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.model.int4 import cpu, kernels
from engine.model.int4.cpu import CpuInt4
from engine.model.int4.cuda import tile_order, unpack_tiles
from engine.model.int4.hqq import GROUP_SIZES, Int4Weight
from engine.model.int4.kernels import find_kernel, probe
from engine.model.int4.linear import measure_min_dense_rows
from engine.model.int4.packed import PackedInt4, Scratch
from tests.int4_weights import CAN_COMPILE, HAS_CPU_KERNEL, KERNEL_NAMES, kernel, random, some_weight

pytestmark = pytest.mark.skipif(not KERNEL_NAMES, reason="this build of torch has no int4 kernel for CPUs")

# Of whole blocks of rows, of several, of a smaller last one, and of less than one.
SHAPES = [(64, 256), (192, 512), (144, 256), (80, 512), (16, 256)]
ROWS = (0, 1, 2, 3, 4, 5, 8, 17, 70)


def assert_close(got: Tensor, expected: Tensor, *, share_of_mean: float) -> None:
    """Within rounding of the result to bfloat16, and a share of the mean result for what is lost on the way."""
    assert got.dtype == torch.bfloat16 and got.shape == expected.shape
    mean = float(expected.abs().sum()) / max(1, expected.numel())
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=share_of_mean * mean)


def assert_kernel_right(packed: PackedInt4, weight: Int4Weight, x: Tensor) -> None:
    """By the kernel, which rounds no weight, and by the dequantised weight, where each is rounded once."""
    exact = (weight.unpack().double().view(*weight.scales.shape, -1) - 8) * weight.scales[..., None].double()
    exact = (exact + weight.zeros[..., None].double()).view(weight.shape)
    assert_close(packed.multiply(x), x.double() @ exact.t(), share_of_mean=2**-12)
    if packed.can_dequantise:
        dense = packed.multiply_dense(x, Scratch())
        assert_close(dense, x.double() @ weight.dequantise().double().t(), share_of_mean=2**-12)
        assert_close(dense, x.double() @ exact.t(), share_of_mean=2**-6)


@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_kernel_gives_what_the_dequantised_weight_gives(name: str, shape: tuple[int, int], group_size: int) -> None:
    weight = some_weight(*shape, group_size)
    packed = kernel(name)(weight)
    for num_rows in ROWS:
        assert_kernel_right(packed, weight, random(num_rows, shape[1], seed=num_rows).bfloat16())
    if packed.can_dequantise or name == "native":
        assert torch.equal(packed.dequantise(), weight.dequantise()), "repacking moves bits and rounds none"
    assert packed.num_bytes == weight.num_bytes


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    packed = kernel(name)(some_weight(192, 256, 64))
    x = random(9, 256).bfloat16()
    whole = packed.multiply(x)
    for row in range(9):
        alone = packed.multiply(x[row : row + 1])
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=2**-7, atol=1e-3)
    x[4] = float("nan")
    with_nan = packed.multiply(x)
    assert bool(with_nan[4].isnan().all())
    assert torch.equal(with_nan[:4], whole[:4]) and torch.equal(with_nan[5:], whole[5:])


@pytest.mark.skipif("native" not in KERNEL_NAMES, reason="no compiler, or no AVX512-BF16")
def test_threads_make_no_difference() -> None:
    packed = kernel("native")(some_weight(1040, 256, 64))
    x = random(5, 256).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(packed.multiply(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(not HAS_CPU_KERNEL or cpu.block_rows() is None, reason="this CPU's layout is not a known one")
def test_a_large_weight_is_dequantised_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_WEIGHTS", 100 * 256)  # one block of rows each, and not two
    weight = some_weight(192, 256, 64)
    assert_kernel_right(CpuInt4(weight), weight, random(6, 256).bfloat16())


def test_scratch_is_memory_that_is_kept_and_grows() -> None:
    scratch = Scratch()
    device = torch.device("cpu")
    first = scratch.take(4, 8, device)
    assert first.shape == (4, 8) and scratch.take(2, 4, device).data_ptr() == first.data_ptr()
    assert scratch.take(8, 8, device).shape == (8, 8)


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_shapes_that_a_kernel_does_not_take_are_told(name: str) -> None:
    assert kernel(name).why_not(torch.Size((64, 256))) is None
    assert "16n" in (kernel(name).why_not(torch.Size((24, 256))) or "")


@pytest.mark.skipif(not HAS_CPU_KERNEL, reason="this build of torch has no int4 kernel for CPUs")
def test_a_layout_is_found_out_by_packing_codes_that_say_where_they_are() -> None:
    # The CPU's operator stands in for CUDA's: 64 rows of two columns are a tile, one after the other along the columns.
    def pack(codes: Tensor) -> Tensor:
        assert cpu.PACK is not None
        return cpu.PACK(torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).int(), 1)

    if cpu.block_rows() != 64:
        pytest.skip("another layout")
    order = tile_order(pack, 64, 2, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(128))
    weight = some_weight(128, 64, 32)
    assert torch.equal(unpack_tiles(pack(weight.codes), order, (128, 64), (64, 2)), weight.unpack())


def test_a_kernel_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    good = kernel(KERNEL_NAMES[0])

    class Wrong(good):  # type: ignore[misc, valid-type]
        name = "a kernel that is wrong"

        def multiply(self, x: Tensor) -> Tensor:
            return super().multiply(x) * 1.1  # type: ignore[no-any-return]

    class Broken(good):  # type: ignore[misc, valid-type]
        name = "a kernel that fails"

        def multiply(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such instruction\nat some address")

    assert probe(good, device) is None
    assert "something else" in (probe(Wrong, device) or "")
    assert probe(Broken, device) == "failed: no such instruction"
    monkeypatch.setattr(kernels, "_candidates", lambda *_: [Broken, Wrong, good])
    assert find_kernel(device, None) is good
    monkeypatch.setattr(kernels, "_candidates", lambda *_: [Broken])
    with pytest.raises(RuntimeError, match="a kernel that fails failed: no such instruction"):
        find_kernel(device, None)
    monkeypatch.setattr(kernels, "_candidates", lambda *_: [])
    with pytest.raises(RuntimeError, match="no int4 kernel for meta"):
        find_kernel(torch.device("meta"), None)


@pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")
def test_our_own_kernel_comes_first(tmp_path: Path) -> None:
    assert find_kernel(torch.device("cpu"), tmp_path).name == kernel("native").name
    assert list(tmp_path.glob("*.so"))


def test_the_crossover_is_where_the_dense_product_is_first_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = some_weight(128, 256, 64)

    class Timed(kernel("torch")):  # type: ignore[misc]
        @property
        def can_dequantise(self) -> bool:
            return True

        def multiply(self, x: Tensor) -> Tensor:
            raise AssertionError("only timed")

    for faster_from, expected in ((8, 8), (64, 64), (10_000, None)):
        rows: list[int] = []

        def time_in_turn(*functions: object, faster_from: int = faster_from, rows: list[int] = rows) -> list[float]:
            rows.append(8 * 2 ** len(rows))
            return [1.0, 0.5 if rows[-1] >= faster_from else 2.0]

        monkeypatch.setattr("engine.model.int4.linear.time_in_turn", time_in_turn)
        assert measure_min_dense_rows(Timed, weight) == expected
    if "native" in KERNEL_NAMES:
        assert measure_min_dense_rows(kernel("native"), weight) is None
