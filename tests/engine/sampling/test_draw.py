"""The uniforms are good and reproducible; a draw follows its weights to the last block."""

from __future__ import annotations

import math

import pytest
import torch

from engine.sampling.draw import BLOCK, _mix, draw_dense, draw_sparse, uniform


def chi_square_z(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations Pearson's statistic lies above its mean; bins expected below 5 are pooled."""
    is_large = expected >= 5
    small = ~is_large
    if expected[small].sum() > 0:
        observed = torch.cat([observed[is_large], observed[small].sum()[None]])
        expected = torch.cat([expected[is_large], expected[small].sum()[None]])
    freedom = observed.numel() - 1
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_the_hash_is_splitmix64() -> None:
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    outputs = [_mix((i * gamma) & mask) for i in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_uniform_never_changes_between_releases() -> None:
    assert uniform(0, 0) == 0.6524484863740322
    assert uniform(42, 7) == 0.7347204584623639


def test_seeds_are_64_bit_and_may_be_negative() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32)]
    assert len({uniform(seed, 3) for seed in seeds}) == len(seeds)
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)
    assert all(0.0 <= uniform(seed, 10**6) < 1.0 for seed in seeds)


@pytest.mark.parametrize(
    "draws",
    [
        pytest.param([uniform(1234, position) for position in range(20_000)], id="positions of one seed"),
        pytest.param([uniform(seed, 0) for seed in range(20_000)], id="first position of consecutive seeds"),
        pytest.param([uniform(seed << 40, seed) for seed in range(20_000)], id="seeds that differ in high bits"),
        pytest.param([uniform(-seed, 5) for seed in range(20_000)], id="negative seeds"),
    ],
)
def test_uniforms_are_uniform_and_uncorrelated(draws: list[float]) -> None:
    values = torch.tensor(draws, dtype=torch.float64)
    n = values.numel()
    assert abs(chi_square_z(torch.histc(values.float(), 200, 0, 1).double(), torch.full((200,), n / 200))) < 4
    pairs = (values[:-1] * 16).long() * 16 + (values[1:] * 16).long()
    assert abs(chi_square_z(torch.bincount(pairs, minlength=256).double(), torch.full((256,), (n - 1) / 256))) < 4
    centred = values - 0.5
    correlation = (centred[:-1] * centred[1:]).mean().item() * 12
    assert abs(correlation) < 4 / math.sqrt(n)
    low_bits = (values * 2**53).long() & 0xFF
    assert abs(chi_square_z(torch.bincount(low_bits, minlength=256).double(), torch.full((256,), n / 256))) < 4


def test_one_bit_of_seed_or_position_changes_half_the_bits() -> None:
    flips = []
    for i in range(200):
        here = int(uniform(i * 7919, i) * 2**53)
        flips.append((here ^ int(uniform((i * 7919) ^ (1 << (i % 64)), i) * 2**53)).bit_count())
        flips.append((here ^ int(uniform(i * 7919, i ^ (1 << (i % 12))) * 2**53)).bit_count())
    assert abs(sum(flips) / len(flips) / 53 - 0.5) < 0.02
    assert min(flips) >= 10


def test_a_dense_draw_is_the_inverse_of_the_cdf() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(40, 9 * BLOCK, generator=generator) ** 8
    weights[:, 5 * BLOCK : 6 * BLOCK] = 0  # a block of nothing
    weights[1, : 7 * BLOCK] = 0
    uniforms = torch.rand(40, 1, generator=generator, dtype=torch.float64)
    drawn = draw_dense(weights, uniforms)
    cdf = weights.double().cumsum(-1)
    target = uniforms * cdf[:, -1:]
    low = torch.where(drawn > 0, cdf.gather(1, (drawn - 1).clamp(min=0)), 0.0)
    high = cdf.gather(1, drawn)
    slack = 1e-6 * cdf[:, -1:]
    assert bool(((low - slack <= target) & (target <= high + slack)).all())
    assert bool((weights.gather(1, drawn) > 0).all())


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("only", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK - 1])
def test_the_only_weight_is_drawn_whatever_the_uniform(u: float, only: int) -> None:
    uniforms = torch.tensor([[u]], dtype=torch.float64)
    weights = torch.zeros(1, 3 * BLOCK)
    weights[0, only] = 1e-30
    assert draw_dense(weights, uniforms).item() == only
    ids = torch.tensor([[9, 2, 5]])
    assert draw_sparse(torch.tensor([[0.0, 0.3, 0.0]], dtype=torch.float64), ids, uniforms).item() == 2


def test_extreme_uniforms_stay_on_tokens_that_have_weight() -> None:
    uniforms = torch.tensor([[0.0], [1.0 - 2.0**-53]], dtype=torch.float64)
    weights = torch.zeros(2, 4 * BLOCK)
    weights[:, 200:300] = 0.1
    assert draw_dense(weights, uniforms)[:, 0].tolist() == [200, 299]


def test_a_row_draws_the_same_bits_alone_and_among_others() -> None:
    generator = torch.Generator().manual_seed(4)
    weights = torch.softmax(torch.randn(37, 50 * BLOCK, generator=generator), -1)
    uniforms = torch.rand(37, 1, generator=generator, dtype=torch.float64)
    together = draw_dense(weights, uniforms)
    alone = torch.cat([draw_dense(weights[i : i + 1], uniforms[i : i + 1]) for i in range(37)])
    assert torch.equal(together, alone)


def test_rows_that_are_not_a_number_do_not_raise() -> None:
    weights = torch.full((1, BLOCK), float("nan"))
    assert 0 <= draw_dense(weights, torch.tensor([[0.5]], dtype=torch.float64)).item() < BLOCK
    ids = torch.arange(3)[None]
    sparse = torch.full((1, 3), float("nan"), dtype=torch.float64)
    assert 0 <= draw_sparse(sparse, ids, torch.tensor([[0.5]], dtype=torch.float64)).item() < 3


def test_a_large_vocabulary_loses_no_tail_to_rounding() -> None:
    width = 1200 * BLOCK
    uniforms = (torch.arange(500, dtype=torch.float64)[:, None] + 0.5) / 500
    drawn = draw_dense(torch.full((1, width), 1.0 / width).expand(500, -1).contiguous(), uniforms)
    assert (drawn - (uniforms * width).long()).abs().max().item() <= 1
