"""The tiny models are worth testing with: varied outputs that depend on all of the context."""

from __future__ import annotations

import pytest
import torch

from tests import zoo


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_outputs_are_diverse_and_depend_on_the_prompt(name: str) -> None:
    model, _ = zoo.make(name)
    outputs = [zoo.generate(model, zoo.prompt(length), 24) for length in (7, 17, 26, 40)]
    assert [len(output) for output in outputs] == [24] * 4
    assert zoo.is_diverse(outputs)


@pytest.mark.parametrize("name", zoo.FAMILIES)
@pytest.mark.parametrize("distance", [1, 4, 8])
def test_a_changed_token_in_the_context_changes_the_logits(name: str, distance: int) -> None:
    model, _ = zoo.make(name)
    prompt = zoo.prompt(30)
    changed = list(prompt)
    changed[-1 - distance] = 3 + (prompt[-1 - distance] - 2) % (zoo.VOCAB_SIZE - 3)
    with torch.no_grad():
        logits = [model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in (prompt, changed)]
    # Far above the noise of float32, so that a lane which misplaces one token cannot pass for exact.
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (zoo.make("llama", seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))


def test_repetitive_or_equal_outputs_are_not_diverse() -> None:
    assert not zoo.is_diverse([[5] * 20, [6] * 20])
    assert not zoo.is_diverse([list(range(20)), list(range(20))])
    assert zoo.is_diverse([list(range(20)), list(range(10, 30))])
