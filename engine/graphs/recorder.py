"""Captures what a function has a CUDA device do, to be done again with one call.

Knows nothing of models or steps: a function without arguments whose tensors all stay where they are.
Called by graphs/steps.py on the engine thread, which captures and replays; a CPU has no recorder.

What a capture keeps is kernels with their arguments: addresses and numbers. Nothing the function does may therefore
depend on a value that the host reads, and all it compiles or sets up on first use must have happened before.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

NUM_WARM_UPS = 2  # the first compiles kernels and makes workspaces, the second runs as the capture will

Compute = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """What can capture."""

    @property
    def num_bytes(self) -> int:
        """Device memory that all captures take, beside what they share with everything else."""

    def record(self, compute: Compute) -> Compute:
        """Run `compute` a few times and return what does the same again.

        The returned call gives one and the same tensor each time, with new values. Raises whatever `compute` raises;
        after that this recorder is not to be used again.
        """


class CudaRecorder:
    """Captures on a stream of its own, into one pool of memory.

    Graphs are replayed one after the other, never at once, so they may use the same memory for what they compute on
    the way: a pool for all of them, filled by the largest, which is therefore to be captured first.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        # One stream for all: the pool lends memory to the stream that took it, and cuBLAS has a workspace for each.
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Device memory that was reserved for captures."""
        return self._num_bytes

    def record(self, compute: Compute) -> Compute:
        """As Recorder.record."""
        with torch.cuda.device(self._device):
            self._warm_up(compute)
            reserved = torch.cuda.memory_reserved(self._device)
            graph = torch.cuda.CUDAGraph()
            with _no_collection(), torch.cuda.stream(self._stream):
                # thread_local: what other threads do with the device is no business of ours.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = compute()
                except BaseException:
                    self._abandon(graph)
                    raise
                graph.capture_end()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._num_bytes += max(0, torch.cuda.memory_reserved(self._device) - reserved)

        return _Replay(graph, result, compute)

    def _warm_up(self, compute: Compute) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                compute()
        torch.cuda.synchronize(self._device)
        # What the warm-up held is of no use to a pool that takes memory for itself.
        torch.cuda.empty_cache()

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that something broke; whoever broke it is heard, not the complaint about it here."""
        with suppress(Exception):
            graph.capture_end()
        # Left open where the end itself fails: other work must not be given the pool's memory.
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        with suppress(Exception):
            graph.reset()
        # Nor is the generator of random numbers told that it is no longer within a capture: it gets a new state.
        with suppress(Exception):
            generator = torch.cuda.default_generators[self._device.index]
            state = torch.Generator(self._device).manual_seed(generator.initial_seed())
            generator.graphsafe_set_state(state)


@dataclass(frozen=True, slots=True)
class _Replay:
    """Does a capture again; what was captured stays loaded, and what it reads allocated, as long as this is there."""

    graph: torch.cuda.CUDAGraph
    result: torch.Tensor
    captured: Compute

    def __call__(self) -> torch.Tensor:
        self.graph.replay()
        return self.result


def recorder_for(device: torch.device) -> Recorder | None:
    """What captures there; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


@contextmanager
def _no_collection() -> Iterator[None]:
    """No cycles are collected meanwhile: the end of some old graph among them would break a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
