"""Which layers get int4 weights: those of the blocks; and a reason for each that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from engine.model.int4.choice import choose_layers
from engine.model.int4.cpu import CpuInt4
from engine.model.int4.hqq import GROUP_SIZES


def skeleton(model_type: str, **values: Any) -> Any:
    shared = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    shared |= {"num_key_value_heads": 2, "vocab_size": 64, **values}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shared))


def chosen(model: Any, group_size: int = 32) -> tuple[set[str], dict[str, str]]:
    choice = choose_layers(model, CpuInt4, group_size)
    return {name.rpartition(".")[2] for name in choice.shapes}, dict(choice.left_alone)


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_linears_of_the_blocks_are_chosen_and_the_head_is_not(is_tied: bool) -> None:
    names, left = chosen(skeleton("llama", tie_word_embeddings=is_tied))
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert left == {"lm_head": "the output head"}


def test_conv1d_counts_with_its_weight_the_other_way_round() -> None:
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    choice = choose_layers(model, CpuInt4, 64)
    assert choice.shapes["transformer.h.0.attn.c_attn"] == (192, 64)
    assert choice.shapes["transformer.h.0.mlp.c_proj"] == (64, 256)


def test_what_the_architecture_keeps_precise_stays() -> None:
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    names, left = chosen(model)
    assert names == {"q", "k", "v", "o", "wi"}
    assert left["encoder.block.0.layer.1.DenseReluDense.wo"] == "kept precise by the architecture"
    assert left["lm_head"] == "the output head"


def test_routers_stay_and_experts_that_are_linears_do_not() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 16, bias=False)
            self.shared_expert_gate = nn.Linear(64, 16, bias=False)
            self.router = nn.Module()
            self.router.classifier = nn.Linear(64, 16)
            self.experts = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 256)  # of a gated MLP

    model = nn.ModuleDict({"moe": Experts(), "mlp": Gated()})
    choice = choose_layers(model, CpuInt4, 64)
    assert set(choice.shapes) == {"moe.experts.0", "moe.experts.1", "mlp.gate"}
    assert set(choice.left_alone.values()) == {"routers of experts"}


def test_shapes_that_do_not_fit_stay() -> None:
    class Own(nn.Linear):
        """A linear that may do something else."""

    model = nn.ModuleDict({"rows": nn.Linear(64, 24), "columns": nn.Linear(96, 64), "own": Own(64, 64)})
    choice = choose_layers(model, CpuInt4, 64)
    assert not choice.shapes
    assert choice.left_alone == {
        "rows": "not of 16n x 2k",
        "columns": "inputs not divisible by 64",
        "own": "of a kind of their own (Own)",
    }


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_larger_groups_fit_fewer_layers(group_size: int) -> None:
    names, _ = chosen(skeleton("llama"), group_size)
    assert (
        names
        == {
            32: {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            64: {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            128: {"down_proj"},
            256: set(),
        }[group_size]
    )
