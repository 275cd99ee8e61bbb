"""The layer: any layout of inputs, biases, both ways to multiply, and whoever uses the weight itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.int4.linear import Int4Linear
from engine.model.int4.packed import Scratch
from engine.model.packed_weight import PackedWeight
from tests.int4_weights import KERNEL_NAMES, kernel, random, some_weight

pytestmark = pytest.mark.skipif(not KERNEL_NAMES, reason="this build of torch has no int4 kernel for CPUs")

WEIGHT = some_weight(64, 128, 64)


def layer(
    name: str = KERNEL_NAMES[0] if KERNEL_NAMES else "", *, has_bias: bool = True, **options: object
) -> Int4Linear:
    bias = nn.Parameter(random(64, seed=5).bfloat16(), requires_grad=False) if has_bias else None
    fields = {"scratch": Scratch(), "min_dense_rows": None, "device": torch.device("cpu"), **options}
    return Int4Linear(kernel(name)(WEIGHT), bias, **fields)  # type: ignore[arg-type]


def expected(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), WEIGHT.dequantise().double(), None if bias is None else bias.double())


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(random(1, 5, 128), id="three dimensions"),
        pytest.param(random(2, 3, 4, 128), id="four dimensions"),
        pytest.param(random(128), id="one dimension"),
        pytest.param(random(0, 128), id="no rows"),
        pytest.param(random(6, 200)[:, 50:178], id="slice"),
        pytest.param(random(128, 7).t(), id="transposed"),
        pytest.param(random(1, 128).expand(5, 128), id="expanded"),
    ],
)
def test_inputs_of_any_layout_are_taken(name: str, has_bias: bool, x: Tensor) -> None:
    linear = layer(name, has_bias=has_bias)
    x = x.bfloat16()
    with torch.inference_mode():
        got = linear(x)
    assert got.shape == (*x.shape[:-1], 64)
    assert_close(got, expected(x, linear.bias))


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_inputs_of_another_type_or_width_raise(name: str) -> None:
    with torch.inference_mode():
        with pytest.raises(RuntimeError):
            layer(name)(random(2, 128))
        with pytest.raises(RuntimeError):
            layer(name)(random(2, 127).bfloat16())


@pytest.mark.skipif("torch" not in KERNEL_NAMES, reason="this build of torch has no int4 kernel for CPUs")
def test_many_rows_go_by_the_dequantised_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layer("torch", min_dense_rows=4)
    packed = linear._packed
    assert packed is not None
    if not packed.can_dequantise:
        pytest.skip("this CPU's layout is not a known one")
    ways: list[str] = []
    for way in ("multiply", "multiply_dense"):

        def noted(*arguments: object, way: str = way, right: object = getattr(packed, way)) -> Tensor:
            ways.append(way)
            return right(*arguments)  # type: ignore[no-any-return, operator]

        monkeypatch.setattr(packed, way, noted)
    for num_rows in (1, 3, 4, 9):
        x = random(num_rows, 128, seed=num_rows).bfloat16()
        assert_close(linear(x), expected(x, linear.bias))
    assert ways == ["multiply", "multiply", "multiply_dense", "multiply_dense"]


@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_whoever_uses_the_weight_itself_gets_it_and_the_layer_is_plain_again(name: str, is_transposed: bool) -> None:
    linear = layer(name, is_transposed=is_transposed)
    plain = WEIGHT.dequantise().t() if is_transposed else WEIGHT.dequantise()
    x = random(3, 128).bfloat16()
    with torch.inference_mode():
        before = linear(x)
        stand_in = linear.weight
        assert isinstance(stand_in, PackedWeight)
        assert (stand_in.dtype, stand_in.shape, stand_in.device.type) == (torch.bfloat16, plain.shape, "cpu")
        assert linear._packed is not None, "looking at dtype and shape unpacks nothing"
        assert linear.num_bytes == WEIGHT.num_bytes
        assert torch.equal(stand_in + 0, plain)
        assert linear._packed is None and linear.num_bytes == 2 * 64 * 128
        assert torch.equal(linear.weight, plain)
        assert_close(linear(x), before.double())


def test_it_says_what_it_is() -> None:
    linear = layer()
    assert linear.num_weights == 64 * 128
    assert "in_features=128, out_features=64, weight=int4, groups of 64" in repr(linear)
    linear.unpack()
    assert "weight=bfloat16" in repr(linear)


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_compiler_of_models_sees_through_it(name: str) -> None:
    linear = layer(name)
    x = random(3, 128).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(linear, backend="eager", fullgraph=True)
        # In a graph the native kernel is its twin, which rounds the weight before it multiplies.
        assert_close(compiled(x), linear(x).double())
