"""Prepacked linear layers on CPU: weights laid out once as oneDNN's kernels read them, in place of the plain ones.

Knows nothing of models, lanes or sampling; a linear that cannot be packed, or measures no faster, stays as it is.
Called by the loader after the model is in memory and before anything is compiled or checked.

Why: plain bf16 F.linear lets oneDNN reorder the weight on its way to the multiplication, every time. Packed, one row
reads 40 GB/s of weights against 27, and 16 rows run at 500 GFLOP/s against 380 (2 cores of an AVX512-BF16 server,
896x4864); bits are the same. The layout does not depend on the number of rows it is packed for, so one serves decode
and prefill.

In float32 packing rounds otherwise than plain: 4e-6 of outputs around 1, where a row alone and the same row among 8
others differ by 2e-6 as they are. It is done for encoder-decoders, 1.6 times as fast at 8 and 16 rows, 2.2 times for
their heads. A decoder's single stream, which gains nothing by it, keeps the very bits of `generate`.

A weight of one row is read at 10 GB/s by oneDNN on one core of a virtual machine, at 24 by our own kernel from the very
same memory (model/native_kernels.cpp); up to 64 rows it was the faster too, and takes them where it measures so.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.model import packed_linear
from engine.model.native_kernels import NativeKernels
from engine.model.packed_linear import PackedLinear
from engine.model.timing import time_in_turn

logger = logging.getLogger(__name__)

MEASURED_ROWS = (1, 16)
"""Packed and plain are compared at these numbers of rows: one stream, and a busy decode step."""

NATIVE_ROWS = (1, 4, 16, 64)
"""Our kernel and oneDNN's are compared at these numbers of rows; ours computes up to the last of them."""

_MAX_SLOWDOWN = 1.1
"""Packed wins unless it is clearly slower, as it is for small weights, whose call costs 8 microseconds more."""

_MAX_RELATIVE_ERRORS = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-17}
"""Against the largest output: two units in the last place of bfloat16, where both run one kernel and are equal; of
float32 64, which a sum of thousands may differ by when it is added in another order."""


@dataclass(frozen=True, slots=True)
class PrepackReport:
    """What prepack_linears did.

    Args:
        num_packed: modules replaced.
        packed_bytes: bytes of their packed weights.
        extra_bytes: those of them whose plain copy is still needed by another module (a tied embedding).
        left_plain: how many modules were left, by reason.
        num_native: those packed of which our own kernel computes few rows.
    """

    num_packed: int
    packed_bytes: int
    extra_bytes: int
    left_plain: Mapping[str, int]
    num_native: int = 0

    def __str__(self) -> str:
        plain = ", ".join(f"{count} {reason}" for reason, count in self.left_plain.items()) or "none"
        megabytes, extra = self.packed_bytes / 2**20, self.extra_bytes / 2**20
        return (
            f"{self.num_packed} linear layers packed ({megabytes:.0f} MiB, {extra:.0f} MiB extra), "
            f"{self.num_native} of them for our own kernel too; left plain: {plain}"
        )


def prepack_linears(
    model: nn.Module, *, max_extra_bytes: int, has_float32: bool = False, kernels: NativeKernels | None = None
) -> PrepackReport:
    """Replace the linears of a model on CPU by packed ones, where that is measured to be right and faster.

    Args:
        model: changed in place; each plain weight is freed as soon as its packed form exists, so memory grows by one
            layer.
        max_extra_bytes: how much memory packing may add for weights whose plain form stays in use (a head tied to the
            embedding: 56 MB for 49,152 x 576, and its multiplication takes two thirds of the time).
        has_float32: whether float32 is packed too, not bfloat16 alone.
        kernels: our own, for few rows of packed weights; None for oneDNN's alone.

    Returns:
        What was done and what was not.
    """
    dtypes = (torch.bfloat16, torch.float32) if has_float32 else (torch.bfloat16,)
    holders = _count_holders(model)
    verdicts: dict[tuple[torch.Size, bool, bool], str | int] = {}  # why not, or the most rows for our own kernel
    packed_of: dict[nn.Module, PackedLinear] = {}
    left_plain: Counter[str] = Counter()
    packed_bytes = extra_bytes = 0
    for parent, name, child in _linears(model):
        if child in packed_of:  # one module in two places
            setattr(parent, name, packed_of[child])
            continue
        weight = child.weight
        size = weight.numel() * weight.element_size()
        is_shared = holders[_storage(weight)] > 1 or weight.untyped_storage().nbytes() > size
        reason = _refusal(child, dtypes)
        native_rows = 0
        if reason is None and is_shared and extra_bytes + size > max_extra_bytes:
            reason = "shared with another module"
        if reason is None:
            kind = (weight.shape, child.bias is not None, type(child) is Conv1D)
            if kind not in verdicts:
                verdicts[kind] = _measure(child, kernels)
            verdict = verdicts[kind]
            reason, native_rows = (verdict, 0) if isinstance(verdict, str) else (None, verdict)
        if reason is not None:
            left_plain[reason] += 1
            continue
        packed_of[child] = packed_form(child)
        if kernels is not None:
            packed_of[child].use_native(kernels, native_rows)
        setattr(parent, name, packed_of[child])
        del child.weight  # now, not when the list of linears goes
        packed_bytes += size
        extra_bytes += size if is_shared else 0
    if packed_bytes > extra_bytes:
        _own_parameters(model, max_bytes=packed_bytes)
    num_native = sum(packed.max_native_rows > 0 for packed in packed_of.values())
    report = PrepackReport(len(packed_of), packed_bytes, extra_bytes, dict(left_plain), num_native)
    logger.info("%s", report)
    return report


def _own_parameters(model: nn.Module, *, max_bytes: int) -> None:
    """Copy what is left of the model out of its checkpoint, if that is at most `max_bytes`.

    A checkpoint is mapped, not read, and stays mapped while one tensor of it lives: the pages of the packed weights'
    plain form would stay resident (202 MB of a 135M model).
    """
    left = [p for p in (*model.parameters(), *model.buffers()) if p.device.type == "cpu"]
    if sum(p.numel() * p.element_size() for p in left) <= max_bytes:
        for parameter in left:
            parameter.data = parameter.data.clone()


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Return (parent, name, module) of each linear, but of no subclass; a Conv1D has an nn.Linear's attributes."""
    return [
        (parent, name, cast(nn.Linear, child))
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear or type(child) is Conv1D
    ]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _count_holders(model: nn.Module) -> Counter[int]:
    """Count, by storage, how many places of the model hold it."""
    holders: Counter[int] = Counter()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[_storage(parameter)] += 1
    return holders


def _refusal(module: nn.Linear, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return why a linear cannot be packed, None if it can."""
    has_operators = packed_linear.REORDER is not None and packed_linear.LINEAR is not None
    if not has_operators or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "without oneDNN"
    if module.weight.device.type != "cpu":
        return "not on CPU"
    if module.weight.dtype not in dtypes:
        return f"in {str(module.weight.dtype).removeprefix('torch.')}"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "with a hook"
    return None


@torch.no_grad()
def packed_form(module: nn.Linear) -> PackedLinear:
    """The packed form of an nn.Linear or a Conv1D, beside it."""
    is_transposed = type(module) is Conv1D
    weight = module.weight.t().contiguous() if is_transposed else module.weight.detach()
    assert packed_linear.REORDER is not None  # _refusal has looked
    packed = PackedLinear(packed_linear.REORDER(weight, None), module.bias, is_transposed=is_transposed)
    return packed.train(module.training)


@torch.no_grad()
def _measure(module: nn.Linear, kernels: NativeKernels | None) -> str | int:
    """Compare one linear with its packed form at MEASURED_ROWS, and that with our own kernel.

    Returns:
        Why the packed form is not for it; else up to how many rows our own kernel is.
    """
    try:
        packed = packed_form(module)
        native_rows = 0 if kernels is None else _native_rows(module, packed, kernels)
        if kernels is not None:
            packed.use_native(kernels, native_rows)
        plain_s = packed_s = 0.0
        for num_rows in MEASURED_ROWS:
            x = torch.randn(num_rows, packed.in_features, dtype=module.weight.dtype)
            if not _is_equal(packed(x), module(x)):
                return "not equal when packed"
            taken = time_in_turn(partial(module, x), partial(packed, x))
            plain_s += taken[0]
            packed_s += taken[1]
    except RuntimeError as error:
        logger.debug("packing a linear failed", exc_info=error)
        return "that oneDNN cannot pack"
    return native_rows if packed_s < plain_s * _MAX_SLOWDOWN else "faster plain"


def _native_rows(module: nn.Linear, packed: PackedLinear, kernels: NativeKernels) -> int:
    """The most of NATIVE_ROWS where our kernel is right and, over all of them, faster; else 0.

    All or nothing: near the cross-over the fastest changes from start to start, and code that was compiled for another
    choice would not be found again.
    """
    native = packed_form(module)
    native.use_native(kernels, NATIVE_ROWS[-1])
    if native.max_native_rows == 0:
        return 0
    share = 1.0
    for num_rows in NATIVE_ROWS:
        x = torch.randn(num_rows, packed.in_features, dtype=module.weight.dtype)
        if not _is_equal(native(x), module(x)):
            logger.warning("our kernel for packed linears gives something else than torch's, and is not used")
            return 0
        native_s, packed_s = time_in_turn(partial(native, x), partial(packed, x))
        share *= native_s / packed_s
    return NATIVE_ROWS[-1] if share < 1 else 0


def _is_equal(got: Tensor, expected: Tensor) -> bool:
    largest = expected.float().abs().max()
    return bool((got.float() - expected.float()).abs().max() <= largest * _MAX_RELATIVE_ERRORS[got.dtype])
