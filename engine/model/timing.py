"""How long functions take; those that are compared, measured in turn so that a busy machine slows all alike.

Knows nothing of what they compute.
Called where a faster way is chosen by trying: packed linears, int4 weights, compiled and captured steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

_MEASURE_S = 0.01


def time_compute(compute: Callable[[], Tensor]) -> float:
    """Return the seconds that one call takes, until its tensor is there."""
    started = time.perf_counter()
    if compute().device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def time_in_turn(*functions: Callable[[], Tensor]) -> list[float]:
    """Return the least time each function took, on one thread where it runs on a CPU."""
    least = [float("inf")] * len(functions)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be all that is measured
    try:
        end = time.perf_counter() + _MEASURE_S * len(functions)
        num_rounds = 0
        while num_rounds < 3 or time.perf_counter() < end:
            for i, function in enumerate(functions):
                least[i] = min(least[i], time_compute(function))
            num_rounds += 1
    finally:
        torch.set_num_threads(num_threads)
    return least
