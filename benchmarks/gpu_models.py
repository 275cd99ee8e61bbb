"""Models of real shapes for the GPU benchmark: weights made where they live, in bfloat16 or int4.

Knows nothing of steps or of what is measured.
Called by benchmarks/gpu.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.models import SHAPES, Shape, randomise
from engine.model.int4.choice import choose_layers
from engine.model.int4.hqq import solve
from engine.model.int4.kernels import find_kernel
from engine.model.int4.linear import Int4Linear, measure_min_dense_rows
from engine.model.int4.packed import Scratch
from engine.model.loader import LoadedModel, describe

Weights = Literal["bf16", "int4"]

GROUP_SIZE = 64  # --hqq-group-size's default
GPU_SHAPES = {
    "llama-2-7b": Shape(
        "llama",
        32_000,
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11_008,
            "max_position_embeddings": 4096,
        },
    ),
    "qwen-0.5b": SHAPES["qwen-0.5b"],
}


def make_model(shape: Shape, device: torch.device, weights: Weights = "bf16", cache: Path | None = None) -> LoadedModel:
    """A model of `shape`; a CPU's int4 kernels are kept in `cache`.

    Raises:
        RuntimeError: the device has no int4 kernel that works.
    """
    config = AutoConfig.for_model(shape.model_type, vocab_size=shape.vocab_size, eos_token_id=None, **shape.values)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    randomise(model)
    if weights == "int4":
        _quantise(model, device, cache)
    return describe(model)


@torch.no_grad()
def _quantise(model: torch.nn.Module, device: torch.device, cache: Path | None) -> None:
    """As --hqq True has it, layer by layer, each plain weight dropped before the next is solved."""
    kernel = find_kernel(device, cache)
    scratch = Scratch()
    min_dense_rows: dict[torch.Size, int | None] = {}
    for name, shape in choose_layers(model, kernel, GROUP_SIZE).shapes.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        weight = solve(linear.weight, GROUP_SIZE)  # type: ignore[arg-type]
        if shape not in min_dense_rows:
            min_dense_rows[shape] = measure_min_dense_rows(kernel, weight)
        layer = Int4Linear(
            kernel(weight),
            linear.bias,  # type: ignore[arg-type]
            scratch=scratch,
            min_dense_rows=min_dense_rows[shape],
            device=device,
        )
        setattr(model.get_submodule(parent), child, layer)
