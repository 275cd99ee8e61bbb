"""Compiled code for certain sizes, each put on trial beside the eager program before it serves.

Knows nothing of what is computed: compile/steps.py and compile/encoder.py say what a trial is made of.
Given moments between steps by engine.py.

A size begins to serve after a trial, on the engine thread and in pieces of one call each, has found that its code
computes what the eager program computes and takes less time: eager code on packed weights is hard to beat for some
models and sizes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Series
from functools import partial
from typing import ClassVar, Generic, Protocol, TypeVar

import torch

from engine.compile.compiler import Compiler, Failure, Package
from engine.model.timing import time_compute

logger = logging.getLogger(__name__)

T = TypeVar("T")
Code = TypeVar("Code")
Given_contra = TypeVar("Given_contra", contravariant=True)

Call = Callable[[list[torch.Tensor]], Series[torch.Tensor]]  # [*tensors, *inputs] -> [output]


class Runs(Protocol[Given_contra]):
    """What computes something from what it is given: eager, or compiled."""

    def run(self, given: Given_contra, /) -> torch.Tensor:
        """Compute it."""


def load_package(package: Package) -> Call:
    """Compiled code, to be called; raises RuntimeError where it cannot be loaded."""
    # One thread calls it, and its bookkeeping for several asks events whether they are done, which breaks a capture.
    return torch._inductor.aoti_load_package(str(package.path), run_single_threaded=True).loader.run


def time_run(program: Runs[T], given: T) -> float:
    """Seconds that a run takes."""
    return time_compute(partial(program.run, given))


class TriedCode(ABC, Generic[T, Code]):
    """A program for a T, and the compiled code that serves in its place; Code is a Runs[T].

    Args:
        program: the eager one.
        compiler: of the program's skeleton.
        load, measure: of a package, and of the seconds of a run.
    """

    what: ClassVar[str]
    """For the log: with the size in the place of %d."""
    num_rounds: ClassVar[int] = 3

    def __init__(
        self,
        program: Runs[T],
        compiler: Compiler,
        *,
        load: Callable[[Package], Call],
        measure: Callable[[Runs[T], T], float],
    ) -> None:
        self._eager = program
        self._compiler = compiler
        self._load = load
        self._measure = measure
        self._live: dict[int, Code] = {}
        self._trial: Iterator[None] | None = None
        self._again: set[int] = set()  # sizes that have had their second chance
        self._num_decided = 0

    @abstractmethod
    def _code(self, size: int, call: Call) -> Code:
        """What runs a package that was loaded."""

    @abstractmethod
    def _samples(self, size: int) -> Iterable[Callable[[], T]]:
        """What a trial runs, each made anew for every run; the last is what is timed."""

    @abstractmethod
    def _compare(self, got: torch.Tensor, expected: torch.Tensor, given: T) -> float:
        """The largest relative error; raises where it is more than rounding."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those that serve."""
        return tuple(sorted(self._live))

    @property
    def num_decided(self) -> int:
        """Of the sizes: they serve, or never will."""
        return self._num_decided

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Call `wake`, on any thread, when has_work becomes true."""
        self._compiler.wake_with(wake)

    def has_work(self) -> bool:
        """Whether advance() has something to do."""
        return self._trial is not None or self._compiler.has_results()

    def advance(self) -> None:
        """Go on with what the compiler has made, for the time of about one run."""
        if self._trial is None:
            result = self._compiler.take()
            if isinstance(result, Failure):
                self._num_decided += 1
                logger.warning(f"{self.what} stay eager: %s", result.size, result.reason)
            elif result is not None:
                self._trial = self._try(result)
            return
        if next(self._trial, self) is self:
            self._trial = None

    def close(self) -> None:
        """End compiling, and drop what was compiled."""
        self._compiler.close()
        self._trial = None
        self._live.clear()

    def _drop(self, size: int) -> None:
        """After a failure of code that served."""
        logger.exception(f"compiled {self.what} failed; eager from here on", size)
        del self._live[size]

    def _try(self, package: Package) -> Iterator[None]:
        """Load, compare, measure; one run between two yields."""
        size = package.size
        try:
            code = self._code(size, self._load(package))
            runs: Runs[T] = code  # type: ignore[assignment]
            yield
            error = 0.0
            for make in self._samples(size):
                given = make()
                expected = self._eager.run(given)
                yield
                given = make()
                error = max(error, self._compare(runs.run(given), expected, given))
                yield
        except Exception as failure:  # whatever compiled code does, the server goes on without it
            self._give_up(package, failure)
            return
        taken = {id(code): float("inf"), id(self._eager): float("inf")}
        for _ in range(self.num_rounds):
            for program in (self._eager, runs):
                taken[id(program)] = min(taken[id(program)], self._measure(program, make()))
                yield
        eager_ms, compiled_ms = 1e3 * taken[id(self._eager)], 1e3 * taken[id(code)]
        origin = "found on disk" if package.seconds is None else f"compiled in {package.seconds:.0f} s"
        self._num_decided += 1
        if compiled_ms >= eager_ms:
            logger.info(f"{self.what} stay eager: %.1f ms, compiled %.1f (%s)", size, eager_ms, compiled_ms, origin)
            return
        self._live[size] = code
        logger.info(
            f"{self.what} are compiled: %.1f ms instead of %.1f, equal within %.1e (%s)",
            size, compiled_ms, eager_ms, error, origin,
        )  # fmt: skip

    def _give_up(self, package: Package, failure: Exception) -> None:
        words = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        self._compiler.discard(package)
        # What was found on disk may be at fault; what was made just now will not be better next time.
        if package.seconds is None and package.size not in self._again:
            self._again.add(package.size)
            logger.warning("%s is of no use (%s): removed, to be compiled again", package.path, words)
            self._compiler.request([package.size])
        else:
            self._num_decided += 1
            logger.warning(f"{self.what} stay eager: %s", package.size, words)
