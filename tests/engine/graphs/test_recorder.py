"""The order in which a capture is made and given up, on a stand-in for torch.cuda; tests/gpu has the real one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.graphs.recorder import CudaRecorder


class FakeCuda:
    """Notes what is asked of it, in turn."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.calls: list[str] = []
        self.current = "main"
        self.breaks = breaks
        self.reserved = 100
        self.default_generators = [torch.Generator()]
        self.CUDAGraph = self._graph
        self.Stream = lambda _device: _Stream(self, "side")

    def _graph(self) -> _Graph:
        return _Graph(self)

    def current_device(self) -> int:
        return 0

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def current_stream(self, _device: object) -> _Stream:
        return _Stream(self, self.current)

    @contextmanager
    def device(self, _device: object) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, _device: object) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty cache")

    def memory_reserved(self, _device: object) -> int:
        return self.reserved


class _Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: _Stream) -> None:
        self._cuda.calls.append(f"{self.name} waits for {other.name}")


class _Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def capture_begin(self, *, pool: tuple[int, int], capture_error_mode: str) -> None:
        self._cuda.calls.append(f"begin on {self._cuda.current} in {pool} {capture_error_mode}")

    def capture_end(self) -> None:
        self._cuda.calls.append(f"end on {self._cuda.current}")
        if self._cuda.breaks:
            raise RuntimeError("the capture was broken")
        self._cuda.reserved += 7

    def replay(self) -> None:
        self._cuda.calls.append("replay")

    def reset(self) -> None:
        self._cuda.calls.append("reset")


def recorder_on(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> CudaRecorder:
    monkeypatch.setattr(torch, "cuda", cuda)
    ended = lambda index, pool: cuda.calls.append(f"pool {pool} of {index} is closed")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    return CudaRecorder(torch.device("cuda"))


def computing(cuda: FakeCuda, result: Any) -> Callable[[], torch.Tensor]:
    def compute() -> torch.Tensor:
        cuda.calls.append(f"compute on {cuda.current}")
        if isinstance(result, Exception) and cuda.calls[-2].startswith("begin"):
            assert not gc.isenabled()
            raise result
        return torch.ones(1)

    return compute


def test_the_first_runs_come_before_the_capture_and_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    recorder = recorder_on(cuda, monkeypatch)
    replay = recorder.record(computing(cuda, None))
    assert cuda.calls == [
        "side waits for main", "compute on side", "compute on side", "synchronize", "empty cache",
        "begin on side in (0, 1) thread_local", "compute on side", "end on side", "main waits for side",
    ]  # fmt: skip
    assert recorder.num_bytes == 7 and gc.isenabled() and cuda.current == "main"
    cuda.calls.clear()
    assert replay() is replay() and cuda.calls == ["replay", "replay"]


def test_a_capture_that_breaks_is_ended_and_whoever_broke_it_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(breaks=True)
    recorder = recorder_on(cuda, monkeypatch)
    with pytest.raises(ValueError, match="the host waits"):
        recorder.record(computing(cuda, ValueError("the host waits")))
    assert cuda.calls[-3:] == ["end on side", "pool (0, 1) of 0 is closed", "reset"]
    assert gc.isenabled() and cuda.current == "main" and recorder.num_bytes == 0
