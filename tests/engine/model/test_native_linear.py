"""A head that shares the embedding's weight is multiplied by our kernel if that is right and faster; never copied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from engine.model import native_linear
from engine.model.native_linear import NativeLinear, use_native_head
from tests.int4_weights import CAN_COMPILE, native_kernels, random

pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")


def model(dtype: torch.dtype = torch.bfloat16, *, vocab_size: int = 64, hidden_size: int = 64) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def measured(monkeypatch: pytest.MonkeyPatch, native_s: float) -> None:
    monkeypatch.setattr(native_linear, "time_in_turn", lambda *functions: [1.0, native_s])


def test_a_tied_head_is_replaced_and_shares_its_weight_still(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.5)
    tied = model()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.inference_mode():
        before = tied(ids).logits
    use_native_head(tied, native_kernels())
    assert isinstance(tied.lm_head, NativeLinear) and tied.get_output_embeddings() is tied.lm_head
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    with torch.inference_mode():
        torch.testing.assert_close(tied(ids).logits, before, rtol=2**-7, atol=2**-7)
    assert "in_features=64, out_features=64" in repr(tied.lm_head)


@pytest.mark.parametrize(
    ("options", "native_s"),
    [
        ({}, 2.0),
        ({"dtype": torch.float32}, 0.5),
        ({"vocab_size": 66}, 0.5),
        ({"hidden_size": 48}, 0.5),
    ],
    ids=["slower", "float32", "rows", "columns"],
)
def test_other_heads_stay(options: dict[str, object], native_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, native_s)
    tied = model(**options)  # type: ignore[arg-type]
    use_native_head(tied, native_kernels())
    assert type(tied.lm_head) is nn.Linear


def test_a_kernel_that_gives_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured(monkeypatch, 0.5)
    monkeypatch.setattr(NativeLinear, "forward", lambda self, x: F.linear(x, self.weight) * 1.1)
    tied = model()
    use_native_head(tied, native_kernels())
    assert type(tied.lm_head) is nn.Linear and "something else" in caplog.text


def test_a_model_without_a_head_is_left_alone() -> None:
    use_native_head(nn.Sequential(nn.Linear(4, 4)), native_kernels())


def test_a_compiler_of_models_sees_through_it() -> None:
    weight = nn.Parameter(random(8, 64).bfloat16(), requires_grad=False)
    linear = NativeLinear(weight, native_kernels())
    x = random(2, 3, 64).bfloat16()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(x), rtol=2**-7, atol=2**-7)
