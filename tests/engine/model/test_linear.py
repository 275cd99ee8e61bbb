"""Packed linears give what the plain ones give, cost no second copy, and get out of the way when they do not fit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from engine.model import linear, packed_linear
from engine.model.linear import prepack_linears
from engine.model.native_kernels import NativeKernels
from engine.model.packed_linear import PackedLinear
from engine.model.packed_weight import PackedWeight
from engine.model.timing import time_in_turn
from tests.int4_weights import CAN_COMPILE, native_kernels

pytestmark = pytest.mark.skipif(packed_linear.LINEAR is None, reason="this build of torch has no packed linears")


@pytest.fixture(autouse=True)
def packed_is_always_faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is faster depends on the machine; these tests are about what is right."""

    def times(*functions: Any) -> list[float]:
        for function in functions:
            function()
        return [2.0, 1.0]

    monkeypatch.setattr(linear, "time_in_turn", times)
    yield


def one(module: nn.Module, *, max_extra_bytes: int = 0) -> tuple[nn.Module, linear.PrepackReport]:
    model = nn.Sequential(module)
    report = prepack_linears(model, max_extra_bytes=max_extra_bytes)
    return model[0], report


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 16, 33, 300])
def test_a_packed_linear_gives_what_the_plain_one_gives(bias: bool, rows: int) -> None:
    plain = nn.Linear(96, 224, bias=bias, dtype=torch.bfloat16)
    weight, offset = plain.weight.detach().clone(), plain.bias.detach().clone() if bias else None
    x = torch.randn(1, rows, 96, dtype=torch.bfloat16)
    packed, report = one(plain)
    assert isinstance(packed, PackedLinear) and report.num_packed == 1 and report.extra_bytes == 0
    assert report.packed_bytes == 96 * 224 * 2
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), F.linear(x, weight, offset), rtol=2**-7, atol=2**-7)
        exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        torch.testing.assert_close(packed(x).double(), exact, rtol=2**-7, atol=2**-7)


def test_float32_is_packed_where_that_is_asked_for() -> None:
    plain = nn.Linear(96, 224)
    weight, offset = plain.weight.detach().clone(), plain.bias.detach().clone()
    model = nn.Sequential(plain)
    assert prepack_linears(model, max_extra_bytes=0, has_float32=True).packed_bytes == 96 * 224 * 4
    assert isinstance(model[0], PackedLinear)
    for rows in (1, 5, 300):
        x = torch.randn(rows, 96)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), F.linear(x, weight, offset), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(8, 200).bfloat16()[:, 50:146], id="slice"),
        pytest.param(torch.randn(96, 7).bfloat16().t(), id="transposed"),
        pytest.param(torch.randn(1, 96).bfloat16().expand(5, 96), id="expanded"),
        pytest.param(torch.randn(2, 3, 4, 96).bfloat16(), id="four dimensions"),
        pytest.param(torch.randn(96).bfloat16(), id="one dimension"),
    ],
)
def test_inputs_of_any_layout_are_taken(x: Tensor) -> None:
    plain = nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = plain(x)
        torch.testing.assert_close(one(plain)[0](x), expected, rtol=2**-7, atol=2**-7)


def test_a_row_does_not_depend_on_how_many_rows_there_are() -> None:
    packed, _ = one(nn.Linear(96, 224, dtype=torch.bfloat16))
    x = torch.randn(33, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        whole = packed(x)
        for count in (1, 2, 3, 8, 16, 17):
            torch.testing.assert_close(packed(x[:count]), whole[:count], rtol=2**-8, atol=2**-9)


def test_inputs_of_another_type_or_width_raise() -> None:
    packed, _ = one(nn.Linear(96, 64, dtype=torch.bfloat16))
    with torch.inference_mode():
        with pytest.raises(RuntimeError):
            packed(torch.randn(2, 96))
        with pytest.raises(RuntimeError):
            packed(torch.randn(2, 95, dtype=torch.bfloat16))


def test_conv1d_is_packed_too() -> None:
    plain = Conv1D(288, 96).bfloat16()
    nn.init.normal_(plain.bias)
    x = torch.randn(1, 5, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = plain(x)
        packed, report = one(plain)
        assert report.num_packed == 1
        torch.testing.assert_close(packed(x), expected, rtol=2**-6, atol=2**-6)
        assert packed.weight.shape == (96, 288)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_whoever_uses_the_weight_itself_gets_it_and_the_module_is_plain_again(is_transposed: bool) -> None:
    plain: nn.Module = Conv1D(64, 96) if is_transposed else nn.Linear(96, 64)
    plain.bfloat16()
    weight = plain.weight.detach().clone()  # type: ignore[operator]
    packed, _ = one(plain)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    assert isinstance(packed, PackedLinear)
    with torch.inference_mode():
        before = packed(x)
        stand_in = packed.weight
        assert isinstance(stand_in, PackedWeight)
        assert (stand_in.dtype, stand_in.shape, stand_in.device.type) == (torch.bfloat16, weight.shape, "cpu")
        assert stand_in.size(0) == weight.shape[0] and "PackedWeight" in repr(stand_in)
        assert packed._packed is not None, "looking at dtype and shape unpacks nothing"
        assert torch.equal(stand_in + 0, weight)
        assert packed._packed is None
        assert torch.equal(packed.weight, weight)
        assert torch.equal(stand_in.t() @ stand_in, weight.t() @ weight)
        torch.testing.assert_close(packed(x), before, rtol=2**-6, atol=2**-6)


def test_plain_weights_are_freed() -> None:
    plain = nn.Linear(96, 64, dtype=torch.bfloat16)
    parameter = plain.weight
    packed, _ = one(plain)
    assert sum(p.numel() for p in packed.parameters()) == 64
    assert not hasattr(plain, "weight") and parameter is not None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at what this process has mapped")
def test_the_checkpoint_is_not_kept_mapped_for_the_little_that_stays_plain(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    prepack_linears(model, max_extra_bytes=0)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(embedding, before)
    assert model.lm_head.weight is embedding


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32, dtype=torch.bfloat16)
        self.head = nn.Linear(32, 50, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("max_extra_bytes", [0, 50 * 32 * 2])
def test_a_tied_head_is_packed_only_when_there_is_room_for_a_second_copy(max_extra_bytes: int) -> None:
    model = _Tied()
    ids = torch.tensor([3, 4])
    with torch.inference_mode():
        expected = model.head(model.embed(ids))
        report = prepack_linears(model, max_extra_bytes=max_extra_bytes)
        torch.testing.assert_close(model.head(model.embed(ids)), expected, rtol=2**-7, atol=2**-7)
    assert report.extra_bytes == max_extra_bytes
    assert isinstance(model.head, PackedLinear) == (max_extra_bytes > 0)
    if not max_extra_bytes:
        assert report.left_plain == {"shared with another module": 1}
        assert model.head.weight is model.embed.weight


def test_one_module_in_two_places_is_packed_once() -> None:
    layer = nn.Linear(32, 32, dtype=torch.bfloat16)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    report = prepack_linears(model, max_extra_bytes=0)
    assert report.num_packed == 1
    assert model["a"][0] is model["b"][0]  # type: ignore[index]


class _Own(nn.Linear):
    """A linear that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_what_is_not_a_plain_bf16_linear_is_left_alone() -> None:
    hooked = nn.Linear(32, 32, dtype=torch.bfloat16)
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    model = nn.Sequential(nn.Linear(32, 32), _Own(32, 32, dtype=torch.bfloat16), hooked)
    report = prepack_linears(model, max_extra_bytes=10**9)
    assert report.num_packed == 0
    assert report.left_plain == {"in float32": 1, "with a hook": 1}
    assert [type(m) for m in model] == [nn.Linear, _Own, nn.Linear]


def test_without_the_operators_everything_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "LINEAR", None)
    module, report = one(nn.Linear(32, 32, dtype=torch.bfloat16))
    assert type(module) is nn.Linear and report.left_plain == {"without oneDNN": 1}


def test_an_operator_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(packed_linear, "REORDER", broken)
    module, report = one(nn.Linear(32, 32, dtype=torch.bfloat16))
    assert type(module) is nn.Linear and report.left_plain == {"that oneDNN cannot pack": 1}


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_an_operator_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    right = packed_linear.LINEAR
    assert right is not None
    monkeypatch.setattr(packed_linear, "LINEAR", lambda *args: right(*args) * wrong)
    module, report = one(nn.Linear(32, 32, dtype=torch.bfloat16))
    assert type(module) is nn.Linear and report.left_plain == {"not equal when packed": 1}


def test_shapes_that_are_faster_plain_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "time_in_turn", lambda *functions: [1.0, 1.2])
    module, report = one(nn.Linear(32, 32, dtype=torch.bfloat16))
    assert type(module) is nn.Linear and report.left_plain == {"faster plain": 1}
    assert "1 faster plain" in str(report)


def test_the_clock_takes_functions_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    calls: list[str] = []
    x = torch.zeros(1)
    num_threads = torch.get_num_threads()
    taken = time_in_turn(lambda: calls.append("a") or x, lambda: calls.append("b") or x)  # type: ignore[func-returns-value]
    assert calls[:4] == ["a", "b", "a", "b"] and len(taken) == 2 and min(taken) > 0
    assert torch.get_num_threads() == num_threads


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.12, attention_bias=True,
        )  # fmt: skip
        return LlamaForCausalLM(config).bfloat16().eval()
    return GPT2LMHeadModel(GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=64)).bfloat16().eval()


@pytest.mark.parametrize(("kind", "num_linears"), [("llama", 15), ("gpt2", 9)])
def test_a_whole_model_gives_the_same_logits(kind: str, num_linears: int) -> None:
    model = tiny(kind)
    ids = torch.randint(0, 160, (2, 9))
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits.float()
        report = prepack_linears(model, max_extra_bytes=10**6)
        got = model(ids, use_cache=False).logits.float()
    assert report.num_packed == num_linears and report.extra_bytes == 160 * 64 * 2
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")
@pytest.mark.parametrize(
    ("size", "last_s", "native_rows"),
    [((224, 96), 7.9, 64), ((70, 72), 7.9, 64), ((70, 72), 8.1, 0), ((64, 33), 0.1, 0)],
    ids=["whole", "padded", "slower over all", "odd columns"],
)
def test_few_rows_are_our_own_kernels_from_the_packed_memory(
    size: tuple[int, int], last_s: float, native_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1, 4 and 16 rows take half the time, 64 do not; then the packed form against the plain one.
    is_even = size[1] % 2 == 0
    times = iter([*([[1.0, 2.0]] * 3 + [[last_s, 1.0]] if is_even else []), *[[2.0, 1.0]] * 2])
    monkeypatch.setattr(linear, "time_in_turn", lambda *_: next(times))
    plain = nn.Linear(size[1], size[0], dtype=torch.bfloat16)
    weight, bias = plain.weight.detach().clone(), plain.bias.detach().clone()
    model = nn.Sequential(plain)
    report = prepack_linears(model, max_extra_bytes=0, kernels=native_kernels())
    packed = model[0]
    assert isinstance(packed, PackedLinear)
    assert packed.max_native_rows == native_rows and report.num_native == (native_rows > 0)
    calls: list[int] = []
    multiply = NativeKernels.packed_multiply

    def counted(self: NativeKernels, x: Tensor, *more: Any) -> Tensor:
        calls.append(x.shape[0])
        return multiply(self, x, *more)

    monkeypatch.setattr(NativeKernels, "packed_multiply", counted)
    expected_calls = [1, 64] if native_rows else []
    with torch.inference_mode():
        for rows in (1, 64, 65):
            x = torch.randn(rows, size[1], dtype=torch.bfloat16)
            exact = F.linear(x.double(), weight.double(), bias.double())
            torch.testing.assert_close(packed(x).double(), exact, rtol=2**-7, atol=2**-7)
        assert calls == expected_calls
        assert torch.equal(packed.unpack(), weight)
        packed(x[:1])
        assert calls == expected_calls and packed.max_native_rows == 0


@pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")
def test_a_kernel_that_gives_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(self: NativeKernels, x: Tensor, words: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
        return torch.ones(*x.shape[:-1], num_outputs, dtype=x.dtype)

    monkeypatch.setattr(NativeKernels, "packed_multiply", wrong)
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    report = prepack_linears(model, max_extra_bytes=0, kernels=native_kernels())
    assert report.num_packed == 1 and report.num_native == 0 and "something else than torch's" in caplog.text
