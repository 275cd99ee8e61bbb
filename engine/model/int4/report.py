"""What became of a model's weights: how many layers are int4, which others are not and why, bytes before and after.

Knows nothing of how anything was quantised.
Called by model/quantize.py when a model is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from engine.model.int4.linear import Int4Linear


@dataclass(frozen=True, slots=True)
class QuantiseReport:
    """What was done.

    Args:
        num_layers: that have int4 weights.
        bytes_before: of the model's weights, had they all stayed in bfloat16 or what they were.
        bytes_after: of the model's weights as they are.
        left_alone: why other weights are as they were: how many of them, and their bytes.
    """

    num_layers: int
    bytes_before: int
    bytes_after: int
    left_alone: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        left = ", ".join(
            f"{count} {reason} ({num_bytes / 2**20:.0f} MiB)" for reason, (count, num_bytes) in self.left_alone.items()
        )
        return (
            f"{self.num_layers} linear layers have int4 weights: {self.bytes_before / 2**20:.0f} MiB of weights became "
            f"{self.bytes_after / 2**20:.0f} MiB; left alone: {left or 'none'}"
        )


def describe_weights(model: nn.Module, left_alone: Mapping[str, str]) -> QuantiseReport:
    """Count a model's weights; `left_alone` has reasons for linear layers, by name."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    num_layers = after = saved = 0
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            num_layers += 1
            after += module.num_bytes
            saved += 2 * module.num_weights - module.num_bytes
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            after += parameter.nbytes
            if parameter.dim() > 1:
                reason = left_alone.get(name) or _kind_of(module, parameter)
                counts[reason] += 1
                sizes[reason] += parameter.nbytes
    return QuantiseReport(
        num_layers, after + saved, after, {reason: (counts[reason], sizes[reason]) for reason in counts}
    )


def _kind_of(module: nn.Module, parameter: Tensor) -> str:
    """What a weight is that was never looked at."""
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
        return "weights of experts, which are one tensor"
    return f"weights of {type(module).__name__}"
