"""Half-quadratic quantisation: a weight matrix as 4-bit codes with a scale and a zero point for each group of its rows.

Knows nothing of modules, kernels, files or devices' layouts.
Called by model/quantize.py for each layer, and by tests as the plain twin of the int4 kernels.

The method is that of Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): scales
are the groups' ranges, and zero points minimise the p-norm of the error for p < 1, which lets the few outliers of a
group be wrong so that its many small weights are right. Half-quadratic splitting alternates two closed forms: shrink
the error (its proximal operator), then average the zero point. No data is needed. The authors' package is not used: it
is built from source, with CUDA wherever it finds some, and it keeps the last zero point of a layer where this keeps the
best of each group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SOLVER_VERSION = 1
"""Raised when the same weights would give other codes: quantised weights on disk are then made anew."""

GROUP_SIZES = (32, 64, 128, 256)  # what torch's int4 kernels take
MAX_CODE = 15
MIDDLE = 8  # the code that the kernels subtract

NUM_ITERATIONS = 20
_NORM = 0.7
_BETA = 10.0
_BETA_GROWTH = 1.01
_SETTLED = 1e-4
"""Iterations end when they improve the error by less than this share; 20 are rarely needed."""

_CHUNK_WEIGHTS = 2**17
"""Solved at a time on a CPU: half a megabyte a buffer, so that 20 iterations run in the cache."""

_CHUNK_WEIGHTS_ACCELERATOR = 2**24


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight [N, K] as (code - 8) * scale + zero, a scale and a zero for each group of K.

    Args:
        codes: uint8 [N, K/2]; the low four bits belong to the even column.
        scales: bfloat16 [N, K/group_size].
        zeros: bfloat16 [N, K/group_size].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the weight: [N, K]."""
        return torch.Size((self.codes.shape[0], 2 * self.codes.shape[1]))

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.zeros))

    def unpack(self) -> Tensor:
        """Return the codes one by one, uint8 [N, K]."""
        return torch.stack((self.codes & 15, self.codes >> 4), dim=-1).view(self.shape)

    def dequantise(self) -> Tensor:
        """Return the weight, bfloat16 [N, K], each value rounded once."""
        centred = self.unpack().view(*self.scales.shape, self.group_size).float() - MIDDLE
        return (centred * self.scales.float()[..., None] + self.zeros.float()[..., None]).bfloat16().view(self.shape)


def why_not_solvable(shape: torch.Size, group_size: int) -> str | None:
    """Return why a weight of this shape cannot be cut into groups, None if it can."""
    if len(shape) != 2 or shape[1] % group_size:
        return f"inputs not divisible by {group_size}"
    return None


@torch.no_grad()
def solve(weight: Tensor, group_size: int) -> Int4Weight:
    """Quantise a weight.

    Args:
        weight: [N, K] of any floating dtype, on the device that is to do the work; K divisible by group_size.
        group_size: one of GROUP_SIZES.

    Returns:
        The quantised weight, on the same device. No group's mean absolute error is above that of rounding to nearest
        between its least and its largest weight, but for the rounding of scale and zero to bfloat16.

    Raises:
        ValueError: the weight holds values that are not finite.
    """
    num_rows, num_columns = weight.shape
    codes = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(num_rows, num_columns // group_size, dtype=torch.bfloat16, device=weight.device)
    zeros = torch.empty_like(scales)
    chunk_weights = _CHUNK_WEIGHTS if weight.device.type == "cpu" else _CHUNK_WEIGHTS_ACCELERATOR
    step = max(1, chunk_weights // num_columns)
    for first in range(0, num_rows, step):
        rows = slice(first, first + step)
        chunk = weight[rows].float().reshape(-1, group_size)
        scale, zero, code = _solve_groups(chunk)
        scales[rows] = scale.view(-1, scales.shape[1])
        zeros[rows] = zero.view(-1, scales.shape[1])
        code = code.view(-1, num_columns)
        codes[rows] = code[:, 0::2] | (code[:, 1::2] << 4)
    if not bool(scales.isfinite().all()):
        raise ValueError("the weight holds values that are not finite")
    return Int4Weight(codes, scales, zeros)


def _solve_groups(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups [G, group_size] float32: scale and zero [G, 1] in bfloat16, codes uint8 [G, group_size]."""
    low, high = weights.aminmax(dim=1, keepdim=True)
    # Rounded first, so that zero points and codes are found for the scale that will be used.
    scale = ((high - low) / MAX_CODE).bfloat16().float()
    # All weights alike: any scale will do, and the zero is the weight.
    is_flat = scale <= low.abs() * 2.0**-16
    scale = torch.where(is_flat, torch.where(low == 0, 1.0, low.abs()), scale)
    inverse = scale.reciprocal()
    zero = torch.where(is_flat, MIDDLE - low * inverse, -low * inverse)
    zero = _best_zero(weights, scale, inverse, zero)
    offset = ((MIDDLE - zero) * scale).bfloat16()
    codes = torch.sub(weights, offset.float()).mul_(inverse).add_(MIDDLE).round_().clamp_(0, MAX_CODE)
    return scale.bfloat16(), offset, codes.to(torch.uint8)


def _best_zero(weights: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
    """Improve zero points [G, 1], in codes, of groups [G, group_size] whose scales are given."""
    best, best_error = zero, torch.full_like(zero, torch.inf)
    codes, error, shrunk = torch.empty_like(weights), torch.empty_like(weights), torch.empty_like(weights)
    scaled = weights * inverse
    beta, previous = _BETA, torch.inf
    for _ in range(NUM_ITERATIONS):
        torch.add(scaled, zero, out=codes).round_().clamp_(0, MAX_CODE)
        # What is left of the weights: W - (code - zero) * scale.
        torch.sub(codes, zero, out=error).mul_(-scale).add_(weights)
        torch.abs(error, out=shrunk)
        group_error = shrunk.mean(dim=1, keepdim=True)
        is_better = group_error < best_error
        best = torch.where(is_better, zero, best)
        best_error = torch.where(is_better, group_error, best_error)
        total = float(best_error.sum())
        if previous - total <= _SETTLED * total:
            break
        previous = total
        # The error's proximal operator for the p-norm: sign(e) * max(|e| - |e|^(p-1) / beta, 0).
        # By way of the logarithm, which is faster than pow; infinite where the error is 0, which shrinks to 0.
        power = shrunk.log().mul_(_NORM - 1).exp_().mul_(1 / beta)
        shrunk.sub_(power).clamp_min_(0).copysign_(error)
        # The zero point that is best for weights without that error, in closed form.
        codes.sub_(scaled).add_(shrunk.mul_(inverse))
        zero = codes.mean(dim=1, keepdim=True)
        beta *= _BETA_GROWTH
    return best
