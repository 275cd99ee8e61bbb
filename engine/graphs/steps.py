"""Decode steps as captured graphs: the host launches one thing in the place of hundreds.

Knows nothing of scheduling or sampling; what captures is graphs/recorder.py.
Asked by model/paged_runner.py and model/seq2seq.py before they run a step; engine.py gives it moments between steps.

Steps are captured for certain numbers of rows, the largest first, between the steps of a server that already answers:
first around the eager step, and once more around compiled code where that begins to serve (compile/steps.py). A graph
serves after a trial has found that it computes what the eager step computes, and takes less time than what it replaces.
Graphs hold addresses: storage is allocated once and never moves, and so are inputs (graphs/scene.py).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Series
from functools import partial
from typing import Generic

import torch

from engine.compile.steps import CompiledCode, CompiledSteps
from engine.compile.trial import compare_logits
from engine.graphs.recorder import Compute, Recorder
from engine.graphs.scene import L, Scene, StepInputs
from engine.model.runner import StepProgram
from engine.model.timing import time_compute
from engine.transfer import upload

logger = logging.getLogger(__name__)

MEASURED_ROUNDS = 3


class Graph(Generic[L]):
    """A captured step.

    Args:
        inputs: that it reads.
        replay: computes the logits [size, V] of what the inputs hold.
    """

    def __init__(self, inputs: StepInputs[L], replay: Compute) -> None:
        self.inputs = inputs
        self._replay = replay

    def run(self, layout: L, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [R, V] of a decode step of at most as many rows, good until the next run."""
        self.inputs.fill(layout, input_ids)
        logits = self._replay()
        if len(layout.logit_rows) == len(layout.input_ids):
            return logits[: len(layout.input_ids)]
        return logits[upload(layout.logit_rows, torch.int64, logits.device)]


class GraphedSteps(Generic[L]):
    """Runs decode steps as graphs where it can.

    Args:
        program: the eager one.
        scene: what steps work on.
        sizes: the buckets, ascending.
        recorder: captures.
        compiled: compiled code of the program's steps, where that is wanted too; its moments come from here.
        measure: seconds that a computation takes; for tests.
    """

    def __init__(
        self,
        program: StepProgram,
        scene: Scene[L],
        sizes: Series[int],
        recorder: Recorder,
        compiled: CompiledSteps | None = None,
        *,
        measure: Callable[[Compute], float] | None = None,
    ) -> None:
        self.program = program
        self._scene = scene
        self._recorder = recorder
        self._compiled = compiled
        self._measure = measure or time_compute
        self._live: dict[int, Graph[L]] = {}
        self._pending = deque(sorted(sizes, reverse=True))
        self._trial: Iterator[None] | None = None
        self._is_broken = False  # a capture failed: none is tried again

    @property
    def sizes(self) -> tuple[int, ...]:
        """The buckets of compiled code that serve."""
        return () if self._compiled is None else self._compiled.sizes

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """The buckets of graphs that serve."""
        return tuple(sorted(self._live))

    @property
    def num_decided(self) -> int:
        """Of the buckets of compiled code: they serve, or never will."""
        return 0 if self._compiled is None else self._compiled.num_decided

    def run(self, layout: L, input_ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """Logits [R, V] of a decode step, good until the next one; None when no graph serves steps like it.

        `input_ids`, int64 [B] or [1, B] on the device, stand in the place of the layout's where they are given.
        """
        num_rows = len(layout.input_ids)
        size = min((size for size in self._live if size >= num_rows), default=None)
        if size is None:
            return None
        try:
            return self._live[size].run(layout, input_ids)
        except Exception:
            logger.exception("the graph of %d sequences failed; eager from here on", size)
            del self._live[size]
            return None

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Call `wake`, on any thread, when has_work becomes true by itself."""
        if self._compiled is not None:
            self._compiled.wake_with(wake)

    def has_work(self) -> bool:
        """Whether advance() has something to do."""
        is_capturing = self._trial is not None or bool(self._pending)
        return is_capturing or (self._compiled is not None and self._compiled.has_work())

    def advance(self) -> None:
        """Go on with capturing, or with what the compiler has made, for the time of a few steps."""
        if self._trial is None and self._pending:
            self._trial = self._capture(self._pending.popleft())
        if self._trial is not None:
            if next(self._trial, self) is self:
                self._trial = None
        elif self._compiled is not None:
            before = set(self._compiled.sizes)
            self._compiled.advance()
            if not self._is_broken:
                self._pending.extend(sorted(set(self._compiled.sizes) - before, reverse=True))

    def close(self) -> None:
        """Drop every graph, and end compiling."""
        self._trial = None
        self._pending.clear()
        self._live.clear()
        if self._compiled is not None:
            self._compiled.close()

    def _capture(self, size: int) -> Iterator[None]:
        """Record, compare, measure; a few steps between two yields."""
        code = None if self._compiled is None else self._compiled.code_of(size)
        kind = "the eager step" if code is None else "compiled code"
        old = self._live.get(size)
        started, num_bytes = time.monotonic(), self._recorder.num_bytes
        try:
            graph = self._record(size, self.program if code is None else code)
        except Exception as failure:
            self._is_broken = True
            self._pending.clear()
            words = " ".join(str(failure).split())[:200]
            logger.warning(
                "steps of %d sequences are not captured around %s, nor any that were left: %s: %s",
                size, kind, type(failure).__name__, words,
            )  # fmt: skip
            return
        seconds = time.monotonic() - started
        yield
        try:
            error = 0.0
            for num_rows in sorted({max(1, size // 2), size}):
                error = max(error, self._compare(graph, num_rows))
                yield
        except Exception as failure:  # whatever it computes, the server goes on without it
            words = " ".join(str(failure).split())[:200]
            logger.warning("the graph of %d sequences around %s does not serve: %s", size, kind, words)
            return
        taken, taken_before = float("inf"), float("inf")
        for _ in range(MEASURED_ROUNDS):
            with self._scene.trial(size) as layout:
                before = partial(self._run_plainly if old is None else old.run, layout)
                taken_before = min(taken_before, self._measure(before))
                taken = min(taken, self._measure(partial(graph.run, layout)))
            yield
        if taken >= taken_before:
            logger.info(
                "the graph of %d sequences around %s does not serve: %.2f ms instead of %.2f",
                size, kind, 1e3 * taken, 1e3 * taken_before,
            )  # fmt: skip
            return
        self._live[size] = graph
        logger.info(
            "steps of up to %d sequences are a graph around %s: %.2f ms instead of %.2f, equal within %.1e "
            "(captured in %.1f s, %.0f MiB)",
            size, kind, 1e3 * taken, 1e3 * taken_before, error, seconds, (self._recorder.num_bytes - num_bytes) / 2**20,
        )  # fmt: skip

    def _record(self, size: int, program: StepProgram | CompiledCode) -> Graph[L]:
        old = self._live.get(size)
        inputs = self._scene.inputs(size) if old is None else old.inputs
        # With rows that belong to nobody: what they write must be there for the eager step of a trial, which has none.
        with self._scene.trial(max(1, size // 2)) as layout:
            inputs.fill(layout, None)
            replay = self._recorder.record(lambda: program.run(inputs.step()))
        return Graph(inputs, replay)

    def _compare(self, graph: Graph[L], num_rows: int) -> float:
        """How far a step's logits are from the eager ones; raises NotFlat where that is more than rounding."""
        with self._scene.trial(num_rows) as layout:
            logits = graph.run(layout)  # before the eager step writes what this one should
            return compare_logits(logits, self._run_plainly(layout))

    def _run_plainly(self, layout: L) -> torch.Tensor:
        return self.program.run(self._scene.eager(layout))
