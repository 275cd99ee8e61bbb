"""Which int4 kernel this machine has: the fastest of those that give what a plain dequantised weight gives.

Knows nothing of modules or models.
Called by model/quantize.py once a load.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.model.int4 import cpu, cuda
from engine.model.int4.cpu import CpuInt4
from engine.model.int4.cuda import CudaInt4
from engine.model.int4.hqq import solve
from engine.model.int4.native import NativeInt4
from engine.model.int4.packed import PackedInt4, Scratch
from engine.model.native_kernels import load_native

logger = logging.getLogger(__name__)

_MAX_RELATIVE_ERROR = 2.0**-6
"""Two units in the last place of bfloat16, against the largest output."""


def find_kernel(device: torch.device, directory: Path | None) -> type[PackedInt4]:
    """Return the best kernel of a device, after trying it.

    Args:
        device: where the weights will be.
        directory: where compiled kernels are kept; None for nowhere.

    Raises:
        RuntimeError: there is none that works; one line says why.
    """
    reasons = []
    for kernel in _candidates(device, directory):
        reason = probe(kernel, device)
        if reason is None:
            logger.info("int4 weights are multiplied by %s", kernel.name)
            return kernel
        logger.warning("%s is not used: it %s", kernel.name, reason)
        reasons.append(f"{kernel.name} {reason}")
    raise RuntimeError("; ".join(reasons) or f"torch {torch.__version__} has no int4 kernel for {device.type}")


def _candidates(device: torch.device, directory: Path | None) -> list[type[PackedInt4]]:
    """Return the kernels that there are, fastest first."""
    found: list[type[PackedInt4]] = []
    if device.type == "cpu":
        native = load_native(directory)
        if native is not None:
            found.append(NativeInt4.with_kernels(native))
        if cpu.PACK is not None and cpu.MULTIPLY is not None:
            found.append(CpuInt4)
    elif device.type == "cuda" and cuda.PACK is not None and cuda.MULTIPLY is not None:
        found.append(CudaInt4)
    return found


@torch.no_grad()
def probe(kernel: type[PackedInt4], device: torch.device) -> str | None:
    """Try a kernel on a small weight: None if it agrees with a plain dequantised weight, else what is wrong."""
    generator = torch.Generator().manual_seed(0)
    weight = solve(torch.randn(128, 256, generator=generator).to(device), 64)
    x = torch.randn(5, 256, generator=generator).to(device, torch.bfloat16)
    expected = x.double() @ weight.dequantise().double().t()
    try:
        packed = kernel(weight)
        results = [packed.multiply(x)]
        if packed.can_dequantise:
            results.append(packed.multiply_dense(x, Scratch()))
        for result in results:
            error = (result.double() - expected).abs().max() / expected.abs().max()
            if not bool(error <= _MAX_RELATIVE_ERROR):
                return f"gives something else than its weight, by {float(error):.1e}"
    except RuntimeError as error:
        return f"failed: {str(error).splitlines()[0]}"
    return None
