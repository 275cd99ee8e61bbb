"""A model drawn from its config, without weights: how many bytes its parameters take, and how wide it computes.

Knows nothing of checkpoints, KV, budgets or machines.
Called by runtime/planning.py, before anything is loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.model.int4.choice import choose_layers
from engine.model.int4.cpu import CHUNK_WEIGHTS, CpuInt4
from engine.model.int4.cuda import CudaInt4
from engine.model.loader import DTYPES, MAX_EXTRA_SHARE, LoadError, LoadRequest, packs_float32, resolve_class
from engine.model.valueless import META

_BUILD_FAILURES = (
    OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError, TypeError, AssertionError,
)  # fmt: skip
"""What building a model from a config that is not for it may raise; NotImplementedError is a RuntimeError."""

INT4_SCALE_BYTES = 4
"""Of each group of int4 weights: a scale and a zero point, both bfloat16."""


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of a model's weights in memory.

    Args:
        by_dtype: of the parameters; "int4" counts packed weights with their scales and zero points.
        buffers: of tensors that are no parameters (rotary tables, causal masks of older models).
        packed_head: of a second, packed copy of a head that is tied to the embedding; at most, for packing is measured.
        num_parameters: of the model, whatever they are stored as.
        num_quantised: how many linear layers are int4.
        scratch: that multiplying int4 weights by many rows works in.
    """

    by_dtype: Mapping[str, int]
    buffers: int
    packed_head: int
    num_parameters: int
    num_quantised: int = 0
    scratch: int = 0

    @property
    def parameters(self) -> int:
        """Of all parameters."""
        return sum(self.by_dtype.values())

    @property
    def total(self) -> int:
        """Of everything that stays in memory."""
        return self.parameters + self.buffers + self.packed_head


@dataclass(frozen=True, slots=True)
class Widths:
    """What a step's activations grow with.

    Args:
        hidden: of the residual stream.
        widest: of the widest intermediate, all experts of a token together.
        num_heads: of queries.
        vocab_size: of the logits.
        itemsize: bytes of a number.
    """

    hidden: int
    widest: int
    num_heads: int
    vocab_size: int
    itemsize: int


def resolve_dtype(name: str, config: Any, stored: str | None) -> torch.dtype:
    """The dtype a model is loaded in: as asked, or for auto the config's, else that of the stored weights."""
    if name != "auto":
        return DTYPES[name]
    wanted = getattr(config, "dtype", None) or stored or "float32"
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    return found if isinstance(found, torch.dtype) else torch.float32


def draw(request: LoadRequest, config: Any, dtype: torch.dtype) -> Any:
    """The model that `request` would load, on the meta device; takes a second for a hundred layers and no memory.

    Mutates:
        config, as building a model does.

    Raises:
        LoadError: the class and the config do not go together.
    """
    model_class = resolve_class(request.model_type)
    build = getattr(model_class, "from_config", None) or getattr(model_class, "_from_config", None)
    if build is None:
        raise LoadError(f"--model-type {request.model_type}: the class cannot be built from a config alone")
    remote: dict[str, Any] = {}
    if request.trust_remote_code and hasattr(model_class, "from_config"):
        remote = {"trust_remote_code": True, "code_revision": request.revision}
    try:
        with META:
            model = build(config, dtype=dtype, **remote)
        model.get_input_embeddings()  # which not every class has, and serving needs
    except _BUILD_FAILURES as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise LoadError(f"{request.name} cannot be built: {type(error).__name__}: {reason}") from error
    model.eval()
    model.requires_grad_(False)
    return model


def count_weights(model: Any, dtype: torch.dtype, device: str, *, int4_group_size: int | None = None) -> WeightBytes:
    """What the weights of a drawn model will take.

    Args:
        model: of draw().
        dtype: that it was drawn in.
        device: cpu, cuda or mps, where it will be.
        int4_group_size: weights that share a scale, with int4; None without.
    """
    int4 = {} if int4_group_size is None else _quantisable(model, int4_group_size, device)
    kept = _kept_in_float32(model, dtype)
    by_dtype: Counter[str] = Counter()
    num_parameters = 0
    for name, parameter in model.named_parameters():  # each once, under however many names
        num_parameters += parameter.numel()
        if id(parameter) in int4:
            by_dtype["int4"] += int4[id(parameter)]
            continue
        found = torch.float32 if kept is not None and kept.search(name) else parameter.dtype
        by_dtype[str(found).removeprefix("torch.")] += parameter.numel() * found.itemsize
    is_packed = dtype == torch.bfloat16 or (dtype == torch.float32 and packs_float32(model.config))
    max_extra = sum(by_dtype.values()) // MAX_EXTRA_SHARE
    return WeightBytes(
        by_dtype=dict(by_dtype),
        buffers=sum(_num_bytes(buffer) for buffer in model.buffers()),
        packed_head=_packed_head_bytes(model, max_extra) if device == "cpu" and is_packed else 0,
        num_parameters=num_parameters,
        num_quantised=len(int4),
        scratch=_scratch_bytes(model, set(int4), device),
    )


def measure_widths(model: Any, dtype: torch.dtype) -> Widths:
    """What the activations of a drawn model grow with."""
    text = model.config.get_text_config(decoder=True)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    num_experts_per_token = _number(text, "num_experts_per_tok") or 1
    widest = [max(linear.weight.shape) for _, linear in _linears(model) if linear is not head]
    # Experts are held as one parameter [experts, rows, columns].
    experts = [max(p.shape[1:]) * num_experts_per_token for p in model.parameters() if p.dim() == 3]
    hidden = int(embedding.weight.shape[1])
    return Widths(
        hidden=hidden,
        widest=max([*widest, *experts, hidden]),
        num_heads=_number(text, "num_attention_heads"),
        vocab_size=int((head or embedding).weight.shape[0]),
        itemsize=dtype.itemsize,
    )


def int4_bytes(num_rows: int, num_columns: int, group_size: int) -> int:
    """Bytes of a weight [rows, columns] in int4: half a byte each, and a scale and zero point a group."""
    return num_rows * (num_columns // 2 + num_columns // group_size * INT4_SCALE_BYTES)


def _number(config: Any, name: str) -> int:
    """A number of a config; 0 where there is none for the whole model, which some configs refuse to be asked for."""
    try:
        return int(getattr(config, name, None) or 0)
    except (RuntimeError, ValueError, TypeError):
        return 0


def _quantisable(model: Any, group_size: int, device: str) -> dict[int, int]:
    """Bytes in int4 of each weight that becomes it, by id."""
    kernel = CudaInt4 if device == "cuda" else CpuInt4
    shapes = choose_layers(model, kernel, group_size).shapes
    return {
        id(model.get_submodule(name).weight): int4_bytes(num_rows, num_columns, group_size)
        for name, (num_rows, num_columns) in shapes.items()
    }


def _scratch_bytes(model: Any, int4: set[int], device: str) -> int:
    """Of the largest weight unpacked, or of the piece of it that the CPU unpacks at a time."""
    largest = max((_num_bytes(p) for p in model.parameters() if id(p) in int4), default=0)
    return min(largest, CHUNK_WEIGHTS * torch.bfloat16.itemsize) if device == "cpu" else largest


def _linears(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]


def _kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Names of parameters that transformers loads in float32 whatever was asked; None for none."""
    names = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(name.replace("*", ".*") for name in sorted(names))) if names else None


def _packed_head_bytes(model: nn.Module, max_bytes: int) -> int:
    """Bytes of linears whose weight another module holds too: packing them keeps both forms, up to a bound."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    total = 0
    for _, linear in _linears(model):
        size = _num_bytes(linear.weight)
        if holders[id(linear.weight)] > 1 and total + size <= max_bytes:
            total += size
    return total


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
