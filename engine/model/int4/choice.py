"""Which layers of a model get int4 weights, and why the others do not.

Knows nothing of kernels' insides, solvers or files.
Called by model/quantize.py with the model's skeleton, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.model.int4.hqq import why_not_solvable
from engine.model.int4.packed import PackedInt4

# Last parts of the names that transformers gives the layer which sends a token to its experts. Only where it is small
# beside its input: a plain layer may have such a name too.
ROUTER_NAMES = frozenset({"gate", "router", "classifier", "wg", "shared_expert_gate"})
_ROUTER_SHARE = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be done.

    Args:
        shapes: [out_features, in_features] of each layer that gets int4 weights, by name.
        left_alone: reasons of those that do not, by name.
    """

    shapes: Mapping[str, torch.Size]
    left_alone: Mapping[str, str]


def choose_layers(model: Any, kernel: type[PackedInt4], group_size: int) -> Choice:
    """Look at every linear layer of a model, which may be on the meta device."""
    shapes: dict[str, torch.Size] = {}
    left_alone: dict[str, str] = {}
    why_not = _rules(model, kernel, group_size)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            reason = why_not(name, module)
            if reason is None:
                shapes[name] = shape_of(module)
            else:
                left_alone[name] = reason
    return Choice(shapes, left_alone)


def shape_of(module: nn.Module) -> torch.Size:
    """Return [out_features, in_features] of an nn.Linear or a Conv1D."""
    shape: torch.Size = module.weight.shape  # type: ignore[assignment]
    return torch.Size(shape[::-1]) if isinstance(module, Conv1D) else shape


def _rules(model: Any, kernel: type[PackedInt4], group_size: int) -> Callable[[str, nn.Module], str | None]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {key.removesuffix(".weight") for key in (*tied.keys(), *tied.values())}
    precise: set[str] = set()
    for part in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            precise.update(getattr(part, attribute, None) or ())

    def why_not(name: str, module: nn.Module) -> str | None:
        shape = shape_of(module)
        if type(module) is not nn.Linear and type(module) is not Conv1D:
            return f"of a kind of their own ({type(module).__name__})"
        if module is head:
            return "the output head"
        if name in tied_names:
            return "tied to other weights"
        if _is_router(name, shape):
            return "routers of experts"
        if any(f".{part}." in f".{name}." for part in precise):
            return "kept precise by the architecture"
        return why_not_solvable(shape, group_size) or kernel.why_not(shape)

    return why_not


def _is_router(name: str, shape: torch.Size) -> bool:
    parts = name.split(".")
    is_named_so = parts[-1] in ROUTER_NAMES or any("router" in part for part in parts[-2:])
    return is_named_so and shape[0] * _ROUTER_SHARE <= shape[1]
