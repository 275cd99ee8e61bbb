"""Output heads whose weight is the embedding's too, multiplied as it lies in memory by our own kernel.

Knows nothing of int4; a head that can be packed without a second copy is packed (model/linear.py) and never comes here.
Called by the loader of int4 models, whose tied head would otherwise take longer than all their other layers.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.linear import MEASURED_ROWS
from engine.model.native_kernels import BF16_COLUMN_MULTIPLE, BF16_ROW_MULTIPLE, NativeKernels
from engine.model.timing import time_in_turn

logger = logging.getLogger(__name__)

_MAX_RELATIVE_ERROR = 2.0**-6
"""Two units in the last place of bfloat16, against the largest output."""


class NativeLinear(nn.Module):
    """y = x W^T with W plain bfloat16 that stays where it is.

    Args:
        weight: bfloat16 [out_features, in_features] on the CPU, contiguous; shared, not copied.
        kernels: the compiled library.
    """

    def __init__(self, weight: nn.Parameter, kernels: NativeKernels) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.native_kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to bfloat16 [..., in_features]: [..., out_features]."""
        weight = self._parameters["weight"]
        assert weight is not None
        if torch.compiler.is_compiling():  # which does not see into a call of a library
            return F.linear(x, weight)
        y = self.native_kernels.bf16_multiply(x.reshape(-1, self.in_features).contiguous(), weight)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what nn.Linear shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias=False"


def use_native_head(model: nn.Module, kernels: NativeKernels) -> None:
    """Replace a model's output head if it is plain still, and that is measured to be right and faster."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if type(head) is not nn.Linear or head.bias is not None or not _is_fit(head.weight):
        return
    native = NativeLinear(head.weight, kernels).train(head.training)
    if not _is_right_and_faster(head, native):
        return
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is head:
                setattr(parent, name, native)
    logger.info("the output head, which shares the embedding's weight, is multiplied by our own kernel")


def _is_fit(weight: Tensor) -> bool:
    is_of_shape = weight.shape[0] % BF16_ROW_MULTIPLE == 0 and weight.shape[1] % BF16_COLUMN_MULTIPLE == 0
    return is_of_shape and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()


@torch.no_grad()
def _is_right_and_faster(plain: nn.Linear, native: NativeLinear) -> bool:
    plain_s = native_s = 0.0
    for num_rows in MEASURED_ROWS:
        x = torch.randn(num_rows, plain.in_features, dtype=torch.bfloat16)
        expected, got = plain(x).float(), native(x).float()
        if not bool((got - expected).abs().max() <= expected.abs().max() * _MAX_RELATIVE_ERROR):
            logger.warning("our kernel for output heads gives something else than torch's, and is not used")
            return False
        taken = time_in_turn(lambda x=x: plain(x), lambda x=x: native(x))  # type: ignore[misc]
        plain_s += taken[0]
        native_s += taken[1]
    return native_s < plain_s
