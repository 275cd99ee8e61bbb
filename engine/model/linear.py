"""Prepacked linear layers on CPU: weights laid out once as oneDNN's kernels read them, in place of the plain ones.

Knows nothing of models, lanes or sampling; a linear that cannot be packed, or measures no faster, stays as it is.
Called by the loader after the model is in memory and before anything is compiled or checked.

Why: plain bf16 F.linear lets oneDNN reorder the weight on its way to the multiplication, every time. Packed, one row
reads 40 GB/s of weights against 27, and 16 rows run at 500 GFLOP/s against 380 (2 cores of an AVX512-BF16 server,
896x4864); bits are the same. The layout does not depend on the number of rows it is packed for, so one serves decode
and prefill. float32 is left alone: packed it is 2.5 times faster at 16 rows but rounds otherwise, and float32 promises
the tokens of `generate`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from engine.model.timing import time_in_turn

logger = logging.getLogger(__name__)

MEASURED_ROWS = (1, 16)
"""Packed and plain are compared at these numbers of rows: one stream, and a busy decode step."""

_MAX_SLOWDOWN = 1.1
"""Packed wins unless it is clearly slower, as it is for small weights, whose call costs 8 microseconds more."""

_MAX_RELATIVE_ERROR = 2.0**-6
"""Two units in the last place of bfloat16, against the largest output; where both run one kernel they are equal."""


def _find_op(name: str) -> Callable[..., Tensor] | None:
    """Return one of oneDNN's private operators, None where this build of torch has none."""
    packet = getattr(torch.ops.mkldnn, name, None)
    op: Callable[..., Tensor] | None = getattr(packet, "default", None)
    return op


_REORDER = _find_op("_reorder_linear_weight")
_LINEAR = _find_op("_linear_pointwise")


@dataclass(frozen=True, slots=True)
class PrepackReport:
    """What prepack_linears did.

    Args:
        num_packed: modules replaced.
        packed_bytes: bytes of their packed weights.
        extra_bytes: those of them whose plain copy is still needed by another module (a tied embedding).
        left_plain: how many modules were left, by reason.
    """

    num_packed: int
    packed_bytes: int
    extra_bytes: int
    left_plain: Mapping[str, int]

    def __str__(self) -> str:
        plain = ", ".join(f"{count} {reason}" for reason, count in self.left_plain.items()) or "none"
        megabytes, extra = self.packed_bytes / 2**20, self.extra_bytes / 2**20
        return (
            f"{self.num_packed} linear layers packed ({megabytes:.0f} MiB, {extra:.0f} MiB extra); left plain: {plain}"
        )


_METADATA = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in ("dtype", "shape", "device", "ndim", "layout", "is_cuda", "requires_grad")
    ]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point]
)
"""What PackedWeight answers itself."""


class Unpackable(Protocol):
    """A module that keeps its weight in a form of its own."""

    def unpack(self) -> Tensor:
        """Go back to the plain weight for good, and return it."""


class PackedWeight(Tensor):
    """Stands for a packed weight where a model reads `module.weight` itself.

    Its dtype, shape and device are there at no cost (T5 and Falcon look at the dtype before each call). The first
    function that needs more (Mamba multiplies by dt_proj's) gets the plain weight, and the module goes back to plain
    for good.
    """

    _owner: Unpackable

    @staticmethod
    def of(
        owner: Unpackable, shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None
    ) -> PackedWeight:
        """Make the stand-in for the weight of `owner`."""
        weight = Tensor._make_wrapper_subclass(PackedWeight, shape, dtype=dtype, device=device or torch.device("cpu"))
        weight._owner = owner
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about metadata; do everything else with the plain weight."""

        def plain(value: Any) -> Any:
            return value._owner.unpack() if isinstance(value, PackedWeight) else value

        with torch._C.DisableTorchFunctionSubclass():
            if func not in _METADATA:
                args, kwargs = tree_map(plain, (args, kwargs))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse what came around __torch_function__: there are no values here."""
        raise NotImplementedError(f"{func} on a packed weight")


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed; stands where an nn.Linear or a Conv1D stood.

    Args:
        packed: the packed weight of [out_features, in_features].
        bias: [out_features] or None; copied.
        is_transposed: whether the replaced module's own `weight` was [in_features, out_features] (Conv1D).
    """

    def __init__(self, packed: Tensor, bias: nn.Parameter | None, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        # Parameters are found by nn.Module.__getattr__, which costs more than the call; plain attributes are not.
        self._bias = None if bias is None else bias.detach().clone()
        self.bias = None if self._bias is None else nn.Parameter(self._bias, requires_grad=False)
        self._packed: Tensor | None = packed
        self._plain: Tensor | None = None
        self._is_transposed = is_transposed
        shape = packed.shape[::-1] if is_transposed else packed.shape
        self._stand_in = PackedWeight.of(self, torch.Size(shape), packed.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [..., in_features] of the weight's dtype: [..., out_features]."""
        packed = self._packed
        if packed is None:
            weight = self.unpack()
            return F.linear(x, weight.t() if self._is_transposed else weight, self._bias)
        return _LINEAR(x, packed, self._bias, "none", [], "")  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:
        """The weight as the replaced module had it; a stand-in until somebody uses its values."""
        return self.unpack() if self._packed is None else self._stand_in

    def unpack(self) -> Tensor:
        """Go back to the plain weight for good, and return it."""
        if self._packed is not None:
            logger.warning(
                "a packed linear %dx%d is used by its weight: plain again", self.in_features, self.out_features
            )
            dense = self._packed.to_dense()
            self._plain = dense.t() if self._is_transposed else dense
            self._packed = None
        assert self._plain is not None  # one of the two is always there
        return self._plain

    def extra_repr(self) -> str:
        """Return what nn.Linear shows, and whether it is packed."""
        is_packed = self._packed is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, {is_packed=}"


def prepack_linears(model: nn.Module, *, max_extra_bytes: int) -> PrepackReport:
    """Replace the bf16 linears of a model on CPU by packed ones, where that is measured to be right and faster.

    Args:
        model: changed in place; each plain weight is freed as soon as its packed form exists, so memory grows by one
            layer.
        max_extra_bytes: how much memory packing may add for weights whose plain form stays in use (a head tied to the
            embedding: 56 MB for 49,152 x 576, and its multiplication takes two thirds of the time).

    Returns:
        What was done and what was not.
    """
    holders = _count_holders(model)
    verdicts: dict[tuple[torch.Size, bool, bool], str | None] = {}
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
        reason = _refusal(child)
        if reason is None and is_shared and extra_bytes + size > max_extra_bytes:
            reason = "shared with another module"
        if reason is None:
            kind = (weight.shape, child.bias is not None, type(child) is Conv1D)
            if kind not in verdicts:
                verdicts[kind] = _measure(child)
            reason = verdicts[kind]
        if reason is not None:
            left_plain[reason] += 1
            continue
        packed_of[child] = _packed_form(child)
        setattr(parent, name, packed_of[child])
        del child.weight  # now, not when the list of linears goes
        packed_bytes += size
        extra_bytes += size if is_shared else 0
    if packed_bytes > extra_bytes:
        _own_parameters(model, max_bytes=packed_bytes)
    report = PrepackReport(len(packed_of), packed_bytes, extra_bytes, dict(left_plain))
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


def _refusal(module: nn.Linear) -> str | None:
    """Return why a linear cannot be packed, None if it can."""
    if _REORDER is None or _LINEAR is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "without oneDNN"
    if module.weight.device.type != "cpu":
        return "not on CPU"
    if module.weight.dtype != torch.bfloat16:
        return f"in {str(module.weight.dtype).removeprefix('torch.')}"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "with a hook"
    return None


@torch.no_grad()
def _packed_form(module: nn.Linear) -> PackedLinear:
    is_transposed = type(module) is Conv1D
    weight = module.weight.t().contiguous() if is_transposed else module.weight.detach()
    assert _REORDER is not None  # _refusal has looked
    packed = PackedLinear(_REORDER(weight, None), module.bias, is_transposed=is_transposed)
    return packed.train(module.training)


@torch.no_grad()
def _measure(module: nn.Linear) -> str | None:
    """Compare one linear with its packed form at MEASURED_ROWS: None if that is right and faster, else why not."""
    try:
        packed = _packed_form(module)
        plain_s = packed_s = 0.0
        for num_rows in MEASURED_ROWS:
            x = torch.randn(num_rows, packed.in_features, dtype=module.weight.dtype)
            expected, got = module(x).float(), packed(x).float()
            if not bool((got - expected).abs().max() <= expected.abs().max() * _MAX_RELATIVE_ERROR):
                return "not equal when packed"
            taken = time_in_turn(lambda x=x: module(x), lambda x=x: packed(x))  # type: ignore[misc]
            plain_s += taken[0]
            packed_s += taken[1]
    except RuntimeError as error:
        logger.debug("packing a linear failed", exc_info=error)
        return "that oneDNN cannot pack"
    return None if packed_s < plain_s * _MAX_SLOWDOWN else "faster plain"
