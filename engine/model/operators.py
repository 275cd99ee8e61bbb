"""Attention and packed or quantised linears as operators that a compiler does not look into.

Knows nothing of compilers: schemas, what they compute here, and the shapes that they have while a step is traced.
Called by compiled steps (engine/compile/), which read the current step through them as the eager forward does.

A compiled step is a graph for a fixed number of rows. What changes from step to step (slots, lengths, how many of the
rows are real) is in the current step, and no argument. The graph does not know that attention writes to slots: it has
no need to, for each layer's attention takes what the layer before it gave.

To compiled code those of NATIVE are functions of the native library (model/native_shims.cpp), and nothing of Python is
called; what is here are their twins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.attention import AttentionCall, attend_flat, attend_sources
from engine.model.encoder_attention import attend_in_blocks
from engine.model.int4 import native  # registers the operator of int4 weights
from engine.model.native_kernels import PACKED_UNIT, SHIMS
from engine.model.paged_step import PagedStep
from engine.model.step import FlatStep, Step, current_step

NAMESPACE = native.NAMESPACE
NATIVE = tuple(SHIMS)
"""Operators that only models with native kernels call."""

# Plain registrations: torch.library.custom_op adds checks to every call, and there are hundreds in a step.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attend(Tensor query, Tensor key, Tensor value, int layer, float scaling, int? window, float? softcap, "
    "Tensor? sinks, int? bias) -> Tensor"
)
_library.define("attend_cross(Tensor query, int layer, int value_dim, float scaling, float? softcap) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attend_slots(Tensor query, Tensor key, Tensor value, Tensor? sinks, int layer, float scaling, int window, "
    "float softcap) -> Tensor"
)
_library.define("attend_whole(Tensor query, Tensor key, Tensor value, float scaling) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("attend_positions(Tensor query, Tensor key, Tensor value, float scaling) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("packed_rows(Tensor x, Tensor words, Tensor? bias, int num_outputs) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("plain_rows(Tensor x, Tensor weight) -> Tensor")  # type: ignore[no-untyped-call]


def _step() -> Step:
    step = current_step()
    if not isinstance(step, FlatStep | PagedStep):
        raise RuntimeError("a compiled step ran outside of a step")
    return step


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: int | None,
) -> Tensor:
    """One layer's attention of [1, H, B, Dk] rows: [1, B, H, Dv], zeros for rows that only fill the bucket.

    The storage of the step gains K and V of its real rows. `bias` is the number of the relative bias, in the order in
    which the model's layers came to theirs.
    """
    step = _step()
    num_rows = step.inputs.input_ids.shape[1]
    call = AttentionCall(scaling, window, softcap, sinks, None if bias is None else _table(step, bias))
    if num_rows == query.shape[2]:
        return _attend_rows(step, layer, query, key, value, call).contiguous()
    rows = slice(num_rows)
    output = query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))
    output[:, rows] = _attend_rows(step, layer, query[:, :, rows], key[:, :, rows], value[:, :, rows], call)
    return output


def _attend_rows(step: Step, layer: int, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    if isinstance(step, PagedStep):
        return step.attend_in(layer, query, key, value, call)
    return attend_flat(step.inputs, layer, query, key, value, call)


def _table(step: Step, number: int) -> Tensor:
    if isinstance(step, PagedStep):
        raise TypeError("paged KV does not serve a position bias")
    return tuple(step.biases.values())[number]


def _attend_cross(query: Tensor, layer: int, value_dim: int, scaling: float, softcap: float | None) -> Tensor:
    """One layer's cross-attention of [1, H, B, Dk] rows: [1, B, H, Dv], zeros for rows that only fill the bucket."""
    step = _step()
    cross = step.cross if isinstance(step, FlatStep) else None
    if cross is None:
        raise RuntimeError("a compiled step wants an encoder's output, and this step has none")
    cross.num_calls = layer
    call = AttentionCall(scaling, None, softcap, None)
    num_rows = step.inputs.input_ids.shape[1]
    output = query.new_zeros((1, query.shape[2], query.shape[1], value_dim))
    output[:, :num_rows] = attend_sources(cross, query[:, :, :num_rows], call)
    return output


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weight is packed: [..., in] -> [..., out]."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _attend_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layer: int,
    scaling: float,
    window: int,
    softcap: float,
) -> Tensor:
    """As _attend; 0 for no window and no softcap."""
    return _attend(query, key, value, layer, scaling, window or None, softcap or None, sinks, None)


def _attend_whole(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of [B, H, L, D] over itself, without a mask: [B, L, H, D]."""
    return attend_in_blocks(query, key, value, scaling).contiguous()


def _packed_rows(x: Tensor, words: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    """A linear layer whose weight is packed, from the packed memory: [..., in] -> [..., out]."""
    weight = words.transpose(1, 2).reshape(words.shape[0] * PACKED_UNIT, -1)
    return F.linear(x, weight[:num_outputs, : x.shape[-1]], bias)


def _plain_rows(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer whose weight lies in memory as it is: [..., in] -> [..., out]."""
    return F.linear(x, weight)


def _attend_shape(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


def _attend_cross_shape(query: Tensor, layer: int, value_dim: int, *_: object) -> Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], value_dim))


def _packed_linear_shape(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _attend_whole_shape(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


def _packed_rows_shape(x: Tensor, words: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], num_outputs))


def _plain_rows_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _name, _function, _shape in (
    ("attend", _attend, _attend_shape),
    ("attend_cross", _attend_cross, _attend_cross_shape),
    ("packed_linear", _packed_linear, _packed_linear_shape),
    ("attend_slots", _attend_slots, _attend_shape),
    ("attend_whole", _attend_whole, _attend_whole_shape),
    ("attend_positions", _attend_whole, _attend_whole_shape),
    ("packed_rows", _packed_rows, _packed_rows_shape),
    ("plain_rows", _plain_rows, _plain_rows_shape),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shape, lib=_library)
