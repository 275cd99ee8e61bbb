"""The solver: as good as its authors' package, better than rounding, exact where it can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.model.int4 import hqq
from engine.model.int4.hqq import GROUP_SIZES, Int4Weight, solve, why_not_solvable
from tests.int4_weights import random

KINDS = {
    "normal": lambda n: n * 0.02,
    "heavy": lambda n: n**3 * 0.01,  # a few outliers in each group
    "offset": lambda n: n * 0.02 + 0.1,
}
# Mean absolute errors on these very weights of hqq 0.2.8.post1 (Quantizer.quantize, nbits=4, axis=1, float32), and
# of the same with optimize=False, which is rounding to nearest between a group's least and largest weight.
OF_THE_PACKAGE = {
    ("normal", 32): (0.00124639, 0.00129972),
    ("normal", 64): (0.00145603, 0.00151118),
    ("normal", 128): (0.00165542, 0.00170186),
    ("normal", 256): (0.00182605, 0.00186854),
    ("heavy", 32): (0.00239188, 0.00323646),
    ("heavy", 64): (0.00305217, 0.00453474),
    ("heavy", 128): (0.00378714, 0.00600192),
    ("heavy", 256): (0.00446743, 0.00783885),
    ("offset", 32): (0.00124639, 0.00129972),
    ("offset", 64): (0.00145603, 0.00151118),
    ("offset", 128): (0.00165542, 0.00170186),
    ("offset", 256): (0.00182605, 0.00186854),
}


def values(weight: Int4Weight) -> Tensor:
    """What a weight stands for, not rounded to bfloat16 at the end."""
    centred = weight.unpack().double().view(*weight.scales.shape, -1) - 8
    return (centred * weight.scales[..., None].double() + weight.zeros[..., None].double()).view(weight.shape)


@pytest.mark.parametrize(("kind", "group_size"), OF_THE_PACKAGE)
def test_errors_are_those_of_the_package_and_below_those_of_rounding(kind: str, group_size: int) -> None:
    weight = KINDS[kind](random(64, 512))
    of_package, of_rounding = OF_THE_PACKAGE[kind, group_size]
    error = float((values(solve(weight, group_size)) - weight).abs().mean())
    assert error < of_package * 1.002  # of which bfloat16 scales and zeros take the most
    assert error < of_rounding * 0.985


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_no_group_is_worse_off_than_by_rounding(group_size: int) -> None:
    weight = KINDS["heavy"](random(64, 512, seed=1))
    groups = weight.view(-1, group_size)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low) / 15
    rounded = ((groups - low) / scale).round() * scale + low
    error = (values(solve(weight, group_size)).view(-1, group_size) - groups).abs().mean(dim=1)
    # A scale rounded to bfloat16 is off by up to 2^-9 of itself, over codes that are up to 8 from the middle.
    slack = scale.squeeze(1) * 8 * 2**-8
    assert bool((error <= (rounded - groups).abs().mean(dim=1) + slack).all())


def test_weights_of_sixteen_values_come_back_exactly() -> None:
    steps = torch.randint(0, 16, (32, 128), generator=torch.Generator().manual_seed(0)).float()
    steps[:, ::64], steps[:, 1::64] = 0, 15  # each group's ends
    weight = (steps - 8) * 2**-5 + 0.5
    solved = solve(weight, 64)
    assert torch.equal(solved.dequantise().float(), weight)
    assert torch.equal(solved.unpack().float(), steps)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 2**-120])
def test_groups_of_one_value_come_back_exactly(value: float) -> None:
    solved = solve(torch.full((16, 64), value), 64)
    assert bool((solved.dequantise() == value).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weight = random(16, 64)
    weight[3, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        solve(weight, 64)


def test_the_pieces_it_works_in_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(48, 256)
    whole = solve(weight, 64)
    for size in (1, 1000, 3 * 256):
        monkeypatch.setattr(hqq, "_CHUNK_WEIGHTS", size)
        pieces = solve(weight, 64)
        # How far a piece is iterated is decided for all of it, so groups may end a little earlier or later.
        error = [(values(w) - weight).abs().mean() for w in (whole, pieces)]
        assert abs(error[0] - error[1]) < error[0] * 0.01


def test_layout_and_sizes() -> None:
    solved = solve(random(48, 256), 64)
    assert solved.shape == (48, 256) and solved.group_size == 64
    assert solved.num_bytes == 48 * 256 // 2 + 2 * 2 * 48 * 4
    codes = solved.unpack()
    assert codes.max() == 15 and codes.min() == 0
    assert torch.equal(solved.codes, codes[:, 0::2] + 16 * codes[:, 1::2])
    assert why_not_solvable(torch.Size((48, 256)), 64) is None
    assert why_not_solvable(torch.Size((48, 100)), 64) == "inputs not divisible by 64"
