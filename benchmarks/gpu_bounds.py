"""The least time that a step can take on a card, from what it must read and multiply: arithmetic alone.

Knows nothing of torch, engines or how anything is measured.
Called by benchmarks/gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.models import Shape


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the card itself was seen to do.

    Args:
        bytes_per_s: of a large copy, what is read and what is written both counted.
        flops_per_s: of a large bfloat16 matrix product.
    """

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Bound:
    """The least seconds of a step, and what sets them: "memory" or "arithmetic"."""

    seconds: float
    by: str


@dataclass(frozen=True, slots=True)
class Costs:
    """What a decoder with gated MLPs takes, by its shape.

    Args:
        layer_weights: numbers in all layers' matrices; every token is multiplied with each.
        head_weights: numbers in the output head; only tokens whose logits are wanted meet it.
        kv_per_token: numbers that a token's keys and values take over all layers.
        attended_per_pair: multiplications for one query token and one key token over all layers, scores and values.
        itemsize: bytes of a number.
        layer_itemsize: bytes of a number of the layers' matrices.
    """

    layer_weights: int
    head_weights: int
    kv_per_token: int
    attended_per_pair: int
    itemsize: int = 2
    layer_itemsize: float = 2.0

    @classmethod
    def of(cls, shape: Shape, *, int4_group_size: int | None = None) -> Costs:
        """The costs of a Llama- or Qwen2-like shape; norms and biases are too small to count.

        With int4 weights each group has a scale and a zero point, of 2 bytes each.
        """
        values: dict[str, Any] = shape.values
        hidden, heads, layers = (values[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        kv_hidden = hidden // heads * values["num_key_value_heads"]
        layer = 2 * hidden * hidden + 2 * hidden * kv_hidden + 3 * hidden * values["intermediate_size"]
        return cls(
            layer_weights=layers * layer,
            head_weights=hidden * shape.vocab_size,
            kv_per_token=2 * layers * kv_hidden,
            attended_per_pair=2 * layers * hidden,
            layer_itemsize=2.0 if int4_group_size is None else 0.5 + 4 / int4_group_size,
        )

    @property
    def weight_bytes(self) -> float:
        """Of everything that a step reads whatever it computes."""
        return self.layer_weights * self.layer_itemsize + self.head_weights * self.itemsize

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of so many tokens' keys and values."""
        return self.kv_per_token * self.itemsize * num_tokens

    def decode(self, batch: int, context: float, ceilings: Ceilings) -> Bound:
        """A step of one token for each of `batch` sequences that see `context` tokens each."""
        weights = self.layer_weights + self.head_weights
        num_bytes = self.weight_bytes + self.kv_per_token * batch * context * self.itemsize
        flops = 2.0 * batch * (weights + self.attended_per_pair * context)
        return _slower(num_bytes, flops, ceilings)

    def prefill(self, num_tokens: int, ceilings: Ceilings) -> Bound:
        """A prompt of `num_tokens` in one step, of which the last wants logits; half of all pairs are causal."""
        num_bytes = self.weight_bytes + self.kv_per_token * num_tokens * self.itemsize
        pairs = num_tokens * (num_tokens + 1) / 2
        flops = 2.0 * (self.layer_weights * num_tokens + self.head_weights + self.attended_per_pair * pairs)
        return _slower(num_bytes, flops, ceilings)


def _slower(num_bytes: float, flops: float, ceilings: Ceilings) -> Bound:
    memory_s, arithmetic_s = num_bytes / ceilings.bytes_per_s, flops / ceilings.flops_per_s
    return Bound(memory_s, "memory") if memory_s >= arithmetic_s else Bound(arithmetic_s, "arithmetic")
