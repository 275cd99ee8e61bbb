"""The demo models' optimizer: frozen weights stay, the others are kept in float32, long gradients are shortened."""

from __future__ import annotations

import torch

from demo.optimization import Optimizer, Rates

_RATES = Rates(num_steps=10, max_minutes=1.0, matrix_lr=0.1, vector_lr=0.1, warmup_steps=1, decay_share=0.5)


class Layers(torch.nn.Module):
    """Two layers, the second frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.learnt = torch.nn.Linear(4, 4)
        self.frozen = torch.nn.Linear(4, 2).requires_grad_(False)


def step(layers: Layers, optimizer: Optimizer) -> None:
    layers.frozen(layers.learnt(torch.ones(3, 4, dtype=torch.bfloat16))).sum().backward()
    optimizer.step(1.0)


def is_matrix(_: str, parameter: torch.nn.Parameter) -> float:
    return float(parameter.ndim == 2)


def test_frozen_weights_stay_and_the_others_are_kept_in_float32() -> None:
    layers = Layers()
    frozen = layers.frozen.weight.detach().clone()
    optimizer = Optimizer(layers, _RATES, is_matrix)
    before = {name: weight.clone() for name, weight in optimizer.weights().items()}
    assert set(before) == {"learnt.weight", "learnt.bias"}
    step(layers, optimizer)
    after = optimizer.weights()
    assert all(
        weight.dtype == torch.float32 and not torch.equal(weight, before[name]) for name, weight in after.items()
    )
    assert torch.equal(layers.frozen.weight, frozen.bfloat16())
    assert torch.equal(layers.learnt.weight, after["learnt.weight"].bfloat16())


def test_a_gradient_longer_than_the_limit_is_shortened() -> None:
    changes = []
    for limit in (None, 1e-12):
        layers = Layers()
        optimizer = Optimizer(layers, _RATES, is_matrix, max_gradient_norm=limit)
        before = optimizer.weights()["learnt.bias"].clone()
        step(layers, optimizer)
        changes.append(float((optimizer.weights()["learnt.bias"] - before).abs().max()))
    # AdamW divides by the gradient's size, but for an epsilon far above so short a gradient.
    assert changes[0] > 0.05 and changes[1] < 1e-3
