"""The one thread that loads and drives the engine: inbox in, a step, outputs out.

Knows nothing of asyncio, requests or text; whoever listens is called on this thread and must not block it.
Started and fed by model_manager.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Series
from typing import Protocol

from engine.errors import InternalError, ServerError
from engine.sequence import EngineStats, Sequence, SequenceOutput
from runtime.hardware import give_free_memory_back

logger = logging.getLogger(__name__)

# Long enough that a pause between two turns of a conversation does not give its memory back.
IDLE_AFTER_S = 10.0


class StepEngine(Protocol):
    """What the thread drives; engine.engine.Engine is one."""

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in; raises CallerError when it can never fit."""

    def abort(self, sequence_id: int) -> None:
        """Forgets a sequence and frees what it owns; idempotent."""

    def step(self) -> list[SequenceOutput]:
        """Advances every sequence it can; raising means that the engine is dead."""

    def has_work(self) -> bool:
        """Whether a step would do something."""

    def stats(self) -> EngineStats:
        """Counters and gauges, cheaply."""

    def on_idle(self) -> None:
        """Gives memory back and checks the books."""

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Takes what is to be called, on any thread, when has_work becomes true by itself."""

    def profile_again(self) -> None:
        """Profiles a few more steps, where profiling is on; called from any thread."""

    def close(self) -> None:
        """Frees everything."""


class Listener(Protocol):
    """Who hears of the thread's news, called on the thread."""

    def on_outputs(self, outputs: Series[SequenceOutput], stats: EngineStats) -> None:
        """A step was done, or sequences were refused or aborted."""

    def on_death(self, error: BaseException) -> None:
        """Loading or stepping raised; the thread ends and nothing more will come."""


class EngineThread:
    """Owns the engine from loading to closing; add, abort and stop may be called from any thread.

    Args:
        open_engine: loads and returns the engine; runs on the thread, since CUDA graphs and caches belong to theirs.
        listener: hears of outputs and of the end.
        microsleep_s: how long an idle engine waits for company after the first arrival.
        idle_after_s: how long nothing must arrive until the engine is told that it is idle, once.
    """

    def __init__(
        self,
        open_engine: Callable[[], StepEngine],
        listener: Listener,
        *,
        microsleep_s: float,
        idle_after_s: float = IDLE_AFTER_S,
    ) -> None:
        self._open_engine = open_engine
        self._listener = listener
        self._microsleep_s = microsleep_s
        self._idle_after_s = idle_after_s
        self._inbox: deque[Sequence | int] = deque()  # a sequence to add, or the id of one to abort, in order
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._busy_since_s: float | None = None
        # A daemon: loading cannot be interrupted, and must not keep a process alive that was told to end.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins loading, then serving."""
        self._thread.start()

    def add(self, sequence: Sequence) -> None:
        """Hands a sequence over."""
        self._inbox.append(sequence)
        self._news.set()

    def abort(self, sequence_id: int) -> None:
        """Has a sequence forgotten, wherever it is."""
        self._inbox.append(sequence_id)
        self._news.set()

    def stop(self) -> None:
        """Ends the thread after the step that runs."""
        self._stopping.set()
        self._news.set()

    def join(self, timeout_s: float) -> bool:
        """Waits for the end; returns whether the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def seconds_in_step(self) -> float:
        """How long the step that runs has been running; 0 between steps, when idle and while loading."""
        since = self._busy_since_s
        return 0.0 if since is None else time.monotonic() - since

    def _run(self) -> None:
        try:
            engine = self._open_engine()
            try:
                engine.wake_with(self._news.set)
                self._serve(engine)
            finally:
                self._busy_since_s = None
                engine.close()
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self._listener.on_death(error)

    def _serve(self, engine: StepEngine) -> None:
        while not self._stopping.is_set():
            self._news.clear()  # before reading the inbox: what arrives from here on sets it again
            outputs = self._read_inbox(engine)
            if engine.has_work():
                self._busy_since_s = time.monotonic()
                outputs += engine.step()
                self._busy_since_s = None
                self._listener.on_outputs(outputs, engine.stats())
            else:
                self._listener.on_outputs(outputs, engine.stats())
                self._wait(engine)

    def _read_inbox(self, engine: StepEngine) -> list[SequenceOutput]:
        """Adds and aborts what has arrived; returns the refusals."""
        refusals = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, int):
                engine.abort(item)
                continue
            try:
                engine.add(item)
            except ServerError as error:
                refusals.append(SequenceOutput(item.sequence_id, error=error))
            except Exception:
                logger.exception("sequence %d could not be added", item.sequence_id)
                engine.abort(item.sequence_id)
                failure = InternalError("the engine could not take the request")
                refusals.append(SequenceOutput(item.sequence_id, error=failure))
        return refusals

    def _wait(self, engine: StepEngine) -> None:
        """Blocks until something arrives, then gives its company a moment to arrive too."""
        if not self._news.wait(self._idle_after_s):
            engine.on_idle()
            give_free_memory_back()
            self._listener.on_outputs((), engine.stats())
            self._news.wait()
        if self._microsleep_s > 0:
            self._stopping.wait(self._microsleep_s)
