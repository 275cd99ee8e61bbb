"""A speech encoder's attention by blocks agrees with its plain twin, alone and inside the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.model.encoder import Encoder
from engine.model.encoder_attention import attend_in_blocks, encoder_attention
from engine.model.native_kernels import NativeKernels
from engine.model.seq2seq_check import try_flat
from engine.sequence import Source
from tests import zoo_seq2seq as zoo
from tests.int4_weights import CAN_COMPILE, native_kernels

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("length", [1, 500, 700])
def test_blocks_agree_with_the_whole(length: int) -> None:
    torch.manual_seed(length)
    query, key, value = (torch.randn(2, length, 3, 16).transpose(1, 2) for _ in range(3))  # as models leave them
    got, weights = encoder_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    scores = torch.matmul(query, key.transpose(-1, -2)) * 0.3
    wanted = torch.matmul(torch.softmax(scores, -1), value).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(got, wanted)


def test_a_mask_is_refused() -> None:
    tensor = torch.zeros(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="mask"):
        encoder_attention(torch.nn.Module(), tensor, tensor, tensor, torch.zeros(1))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_in_bfloat16_the_models_own_attention_gives_way(dtype: torch.dtype) -> None:
    plain, served = (zoo.make_whisper().to(dtype) for _ in range(2))
    parts = try_flat(served, DEVICE, num_positions=64, is_speech=True)
    assert not isinstance(parts, str)
    name = served.get_encoder().layers[0].self_attn.config._attn_implementation
    assert (name == "encoder_blocks") == (dtype is torch.bfloat16)
    source = Source(b"", zoo.NUM_SOURCE_POSITIONS, features=zoo.features())
    got = parts.encoder.encode([source])[0].float()
    wanted = Encoder(plain, DEVICE, torch.no_grad).encode([source])[0].float()
    assert ((got - wanted).norm() / wanted.norm()).item() < (0.03 if dtype is torch.bfloat16 else 1e-6)


class WithKernels(torch.nn.Module):
    """A module that holds the kernels as packed layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.native_kernels = native_kernels()


@pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")
@torch.inference_mode()
def test_layers_with_kernels_of_our_own_are_attended_to_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = WithKernels()
    calls: list[float] = []
    attend = NativeKernels.attend_positions

    def counted(self: NativeKernels, *tensors_and_scaling: Any) -> torch.Tensor:
        calls.append(tensors_and_scaling[3])
        return attend(self, *tensors_and_scaling)

    monkeypatch.setattr(NativeKernels, "attend_positions", counted)
    query, key, value = (torch.randn(1, 60, 2, 32).bfloat16().transpose(1, 2) for _ in range(3))
    got, _ = encoder_attention(module, query, key, value, None)
    assert calls == [32**-0.5]
    torch.testing.assert_close(got, attend_in_blocks(query, key, value, 32**-0.5), rtol=3e-2, atol=3e-2)
    query, key, value = (torch.randn(1, 2, 60, 24).bfloat16() for _ in range(3))  # not whole registers
    encoder_attention(module, query, key, value, None)
    assert len(calls) == 1
