"""A skeleton is the model without its values: small, the same for every checkpoint, and complete."""

from __future__ import annotations

import torch

from engine.compile.skeleton import Skeleton, put_on, take_skeleton
from engine.model.runner import FlatModel
from tests import zoo
from tests.engine.harness import tiny_model


def skeleton_of(model: torch.nn.Module) -> tuple[Skeleton, list[torch.Tensor]]:
    return take_skeleton(FlatModel(model), model)


def test_a_skeleton_with_the_tensors_put_on_is_the_model() -> None:
    model = tiny_model("llama")
    skeleton, tensors = skeleton_of(model)
    again = put_on(skeleton.data, tensors).model
    ids = torch.tensor([zoo.prompt(9)])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    assert len(skeleton.data) < 20_000 < sum(tensor.nbytes for tensor in tensors)


def test_the_fingerprint_tells_architectures_and_dtypes_apart_but_not_weights() -> None:
    other_weights = tiny_model("llama")
    for parameter in other_weights.parameters():
        parameter.data.normal_()
    fingerprints = [
        skeleton_of(model)[0].fingerprint
        for model in (tiny_model("llama"), other_weights, tiny_model("qwen3"), tiny_model("llama").bfloat16())
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3
