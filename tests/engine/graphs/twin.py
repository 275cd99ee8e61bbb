"""Captures without a GPU: replays by computing again, and sees to it that a CUDA graph could have done the same.

A graph keeps kernels with the addresses and numbers that they were launched with. So the twin notes every operator of a
capture with its numbers and shapes, and the addresses of the tensors that were there before; a replay must launch the
same ones. What a host reads of a tensor fails at once, as it does in a capture.

Called by the tests of captured steps.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.graphs.recorder import NUM_WARM_UPS, Compute


class NotCapturable(Exception):
    """The host waits for the device, or depends on what it reads there."""


class StaleReplay(Exception):
    """A replay would read or write elsewhere than what is there now, or with other numbers."""


_READS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"})


class Notes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is launched while this is on: one entry an operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[tuple[Any, ...]] = []
        self.kept: list[torch.Tensor] = []  # so that no address is given away and given out again
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note, then compute."""
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _READS:
            raise NotCapturable(f"{name} in a capture")
        entry: list[Any] = [name]
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, torch.Tensor):
                entry.append(leaf)
                continue
            entry.append((tuple(leaf.shape), leaf.stride(), leaf.dtype))
            address = leaf.untyped_storage().data_ptr()
            if address not in self._made:
                entry.append(leaf.data_ptr())
                self.kept.append(leaf)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                address = leaf.untyped_storage().data_ptr()
                if not any(address == kept.untyped_storage().data_ptr() for kept in self.kept):
                    self._made.add(address)
                    self.kept.append(leaf)
        self.launches.append(tuple(map(repr, entry)))
        return result


class TwinRecorder:
    """Stands for CudaRecorder."""

    num_bytes = 0

    def __init__(self) -> None:
        self.sizes: list[int] = []  # rows of what was captured, in turn
        self.replayed: list[int] = []

    def record(self, compute: Compute) -> Compute:
        """As Recorder.record."""
        for _ in range(NUM_WARM_UPS):
            compute()
        with Notes() as captured:
            result = compute()
        self.sizes.append(result.shape[0])

        def replay() -> torch.Tensor:
            with Notes() as notes:
                again = compute()
            for now, then in zip(notes.launches, captured.launches, strict=True):
                if now != then:
                    raise StaleReplay(f"{now} is not {then}")
            self.replayed.append(result.shape[0])
            return result.copy_(again)

        return replay


class Stopwatch:
    """In the place of measuring: whatever comes later takes less time."""

    def __init__(self) -> None:
        self._counts = itertools.count()

    def __call__(self, compute: Compute) -> float:
        compute()
        return 1.0 / (1 + next(self._counts))
