"""A decode step of a fixed number of rows as a graph, traced from a model without values.

Knows nothing of code generation, caches or processes.
Called by compile/worker.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface

from engine.compile.skeleton import MIN_TEXT_LENGTH, Skeleton, SourceShape, TensorSpec, put_on
from engine.kv.slots import SlotStorage
from engine.model import encoder_attention, operators
from engine.model.attention import NAME, NotFlat, flat_attention
from engine.model.cross_attention import CrossStep
from engine.model.encoder import EncoderInputs
from engine.model.inputs import FlatInputs
from engine.model.int4.linear import Int4Linear
from engine.model.int4.native import NativeInt4
from engine.model.native_linear import NativeLinear
from engine.model.native_step import can_attend
from engine.model.packed_linear import PackedLinear
from engine.model.relative_bias import is_relative
from engine.model.step import FlatStep

_TRACED_LENGTH = 24  # of a text; the graph takes others too

_ops = getattr(torch.ops, operators.NAMESPACE)


def trace(skeleton: Skeleton, size: int) -> torch.export.ExportedProgram:
    """The graph of a step of `size` rows, or of an encoder of `size` sources.

    Raises:
        Exception: whatever a model's code raises that cannot be traced (a branch on a value, an unknown operator).
    """
    return trace_step(skeleton, size) if skeleton.source is None else trace_encoder(skeleton, skeleton.source, size)


def trace_encoder(skeleton: Skeleton, source: SourceShape, num_sources: int) -> torch.export.ExportedProgram:
    """The graph of (tensors, spectrograms [B, F, T]) or (tensors, ids [B, L], mask [B, L]) -> output [B, L, D].

    Raises:
        Exception: as trace.
    """
    is_text = source.max_length is not None
    with FakeTensorMode():
        tensors = [_fake(spec) for spec in skeleton.specs]
        shape = (num_sources, _TRACED_LENGTH) if is_text else (num_sources, *source.shape)
        inputs = [torch.ones(shape, dtype=source.dtype, device=source.device) for _ in range(2 if is_text else 1)]
    dynamic: Any = None
    if is_text:
        length = torch.export.Dim("length", min=MIN_TEXT_LENGTH, max=source.max_length)
        dynamic = ([{} for _ in tensors], ({1: length}, {1: length}))
    with torch.no_grad():
        program = torch.export.export(_Encoder(skeleton), (tensors, *inputs), dynamic_shapes=dynamic, strict=False)
    return _whole(program)


def trace_step(skeleton: Skeleton, num_rows: int) -> torch.export.ExportedProgram:
    """The graph of (tensors, input_ids [1, B], position_ids [1, B]) -> logits [B, V].

    Raises:
        Exception: whatever a model's code raises that cannot be traced (a branch on a value, an unknown operator).
    """
    device = skeleton.specs[0].device
    with FakeTensorMode():
        tensors = [_fake(spec) for spec in skeleton.specs]
        ids, positions = (torch.zeros((1, num_rows), dtype=torch.int64, device=device) for _ in range(2))
    with torch.no_grad():
        program = torch.export.export(_Step(skeleton, device), (tensors, ids, positions), strict=False)
    return _whole(program)


def _whole(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program, which has to get every tensor from outside."""
    if program.constants or program.state_dict:
        raise RuntimeError(f"{len(program.constants) + len(program.state_dict)} tensors of the model were not found")
    return program


def _fake(spec: TensorSpec) -> Tensor:
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)


class _Step(nn.Module):
    """One step of the program whose skeleton this is."""

    def __init__(self, skeleton: Skeleton, device: str) -> None:
        super().__init__()
        self._skeleton = skeleton
        self._device = torch.device(device)

    def forward(self, tensors: list[Tensor], input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor]:
        program = put_on(self._skeleton.data, tensors)
        _prepare(program.model, is_native=True)
        marker = getattr(program, "marker", None)
        AttentionInterface.register(NAME, _Attention(marker, is_native=self._skeleton.is_native))
        rows = torch.arange(input_ids.shape[1], device=self._device)
        inputs = FlatInputs((), input_ids, position_ids, rows, (), ())
        cross = None if marker is None else CrossStep(marker, (), (), {})
        try:
            logits: Tensor = program.run(FlatStep(inputs, SlotStorage((), self._device), cross))
        finally:
            AttentionInterface.register(NAME, flat_attention)
        return (logits,)


class _Encoder(nn.Module):
    """The encoder whose skeleton this is."""

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__()
        self._skeleton = skeleton

    def forward(self, tensors: list[Tensor], *inputs: Tensor) -> tuple[Tensor]:
        program = put_on(self._skeleton.data, tensors)
        # Texts have any length, and a graph cannot choose between two kernels by it.
        _prepare(program.model, is_native=False)
        AttentionInterface.register(encoder_attention.NAME, partial(_attend_whole, is_native=self._skeleton.is_native))
        try:
            return (program.run(EncoderInputs(inputs[0], inputs[1] if len(inputs) > 1 else None)),)
        finally:
            AttentionInterface.register(encoder_attention.NAME, encoder_attention.encoder_attention)


def _attend_whole(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    is_native: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As encoder_attention; in blocks it takes so long that a way through Python is nothing."""
    if attention_mask is not None:
        raise NotImplementedError("a speech encoder has no mask")
    attend = _ops.attend_positions if is_native and can_attend(query, key, value) else _ops.attend_whole
    return attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _prepare(model: nn.Module, *, is_native: bool) -> None:
    """Put operators in the place of what a graph cannot hold; with `is_native` ours for few rows of packed weights."""
    for module in model.modules():
        forward = _forward_in_graph(module, is_native=is_native)
        if forward is not None:
            module.forward = forward


def _forward_in_graph(module: nn.Module, *, is_native: bool) -> Callable[[Tensor], Tensor] | None:
    """What stands for a module's forward that a graph cannot hold; None where it can."""
    if isinstance(module, PackedLinear) and module._packed is not None:
        return _PackedForward(module, is_native=is_native)
    if isinstance(module, Int4Linear) and isinstance(module._packed, NativeInt4):
        packed, bias = module._packed, module.bias

        def multiply(x: Tensor) -> Tensor:
            y = packed.multiply_traced(x.contiguous())
            return y if bias is None else y + bias

        return multiply
    if isinstance(module, NativeLinear):
        weight = module.weight
        return lambda x: _ops.plain_rows(x.contiguous(), weight)
    return None


class _PackedForward:
    """In the place of a PackedLinear's forward: inductor wants to know the values of weights packed by oneDNN."""

    def __init__(self, module: PackedLinear, *, is_native: bool) -> None:
        self._packed, self._bias, self._words = module._packed, module._bias, module._words
        self._size, self._max_native_numel = module.out_features, module._max_native_numel if is_native else -1

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor
        if x.numel() <= self._max_native_numel:
            result = _ops.packed_rows(x.contiguous(), self._words, self._bias, self._size)
        else:
            result = _ops.packed_linear(x, self._packed, self._bias)
        return result


class _Attention:
    """What models call as attention while they are traced: numbers the calls, and leaves the rest to the operators.

    Args:
        marker: what a decoder hands over in the place of its encoder's K and V; None where there is no encoder.
        is_native: whether our own kernel serves where it can.
    """

    def __init__(self, marker: Tensor | None, *, is_native: bool) -> None:
        self._marker = marker
        self._is_native = is_native
        self._num_calls = 0
        self._num_cross_calls = 0
        self._biases: list[int] = []  # ids of the modules with a relative bias, as they came
        self._bias: int | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As flat_attention, which has refused what this lane cannot do when the model was checked."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._marker is not None and key is self._marker:
            layer, self._num_cross_calls = self._num_cross_calls, self._num_cross_calls + 1
            return _ops.attend_cross(query, layer, value.shape[3], scaling, softcap), None
        if attention_mask is not None:
            raise NotFlat("the model makes an attention mask of its own")
        layer, self._num_calls = self._num_calls, self._num_calls + 1
        bias = None if position_bias is None else self._bias_of(module)
        if self._is_native and bias is None and can_attend(query, key, value):
            sinks = None if s_aux is None else s_aux.float()
            return _ops.attend_slots(
                query, key, value, sinks, layer, scaling, sliding_window or 0, softcap or 0.0
            ), None
        return _ops.attend(query, key, value, layer, scaling, sliding_window, softcap, s_aux, bias), None

    def _bias_of(self, module: nn.Module) -> int | None:
        if is_relative(module):
            if id(module) not in self._biases:
                self._biases.append(id(module))
            self._bias = self._biases.index(id(module))
        return self._bias
