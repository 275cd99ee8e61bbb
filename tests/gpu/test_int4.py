"""On a CUDA device, the int4 kernel and the way around it give what the plain dequantised weight gives."""

from __future__ import annotations

import pytest
import torch

from engine.model.int4.cuda import CudaInt4
from engine.model.int4.hqq import GROUP_SIZES, solve
from engine.model.int4.kernels import find_kernel, probe
from engine.model.int4.linear import measure_min_dense_rows
from engine.model.int4.packed import Scratch
from tests.int4_weights import random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", [(64, 256), (896, 4864 // 256 * 256), (4096, 4096)], ids=str)
def test_both_ways_give_what_the_dequantised_weight_gives(shape: tuple[int, int], group_size: int) -> None:
    weight = solve((random(*shape) * 0.05).cuda(), group_size)
    packed = CudaInt4(weight)
    plain = weight.dequantise()
    assert torch.equal(packed.dequantise(), plain)
    for num_rows in (1, 3, 16, 100):
        x = random(num_rows, shape[1]).cuda().bfloat16()
        expected = x.double() @ plain.double().t()
        for got in (packed.multiply(x), packed.multiply_dense(x, Scratch())):
            assert float((got.double() - expected).norm() / expected.norm()) < 2**-7


def test_it_is_found_and_measured() -> None:
    device = torch.device("cuda")
    assert probe(CudaInt4, device) is None
    assert find_kernel(device, None) is CudaInt4
    measured = measure_min_dense_rows(CudaInt4, solve((random(1024, 1024) * 0.05).cuda(), 64))
    assert measured is None or measured >= 8
