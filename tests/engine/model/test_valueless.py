"""Operations without values: shapes as always, answers where code asks for numbers, and the world as before after."""

from __future__ import annotations

import pytest
import torch

from engine.model.valueless import valueless


def test_code_that_asks_for_values_gets_a_quiet_ordinary_answer() -> None:
    with valueless():
        mask = torch.ones(2, 3, dtype=torch.int64)
        assert mask.device.type == "meta"
        assert bool((mask == 1).all())  # no padding
        assert not bool((mask == 0).any())
        assert 0 not in mask + 1
        assert (mask.sum().item(), float(mask[0, 0]), int(mask.max())) == (0, 0.0, 0)
        assert mask.tolist() == [[0, 0, 0], [0, 0, 0]]
        assert torch.equal(mask, mask + 1)  # which only a value could tell
        assert mask.nonzero().shape == (6, 2)


def test_shapes_and_dtypes_are_those_of_the_real_operations() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x @ x.transpose(-1, -2), x[..., :1]], dim=-1).to(torch.bfloat16)

    expected = compute(torch.ones(2, 4, 3))
    with valueless():
        got = compute(torch.ones(2, 4, 3))
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


def test_afterwards_tensors_have_values_again() -> None:
    with valueless():
        left = torch.ones(2)
    assert torch.ones(2).sum().item() == 2
    with pytest.raises(RuntimeError, match="meta"):
        left.sum().item()
