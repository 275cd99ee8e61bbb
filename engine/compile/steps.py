"""Decode steps by compiled code where that is there, right and faster; eager everywhere else.

Knows nothing of scheduling or sampling; what compiles is compile/compiler.py.
Stands in the place of a lane's own program: the runners call run, engine.py gives it moments between steps.

Code is compiled for certain numbers of rows. A step runs in the smallest bucket that it fits, with rows that belong to
nobody behind its own. A bucket begins to serve after a trial, on the engine thread and in pieces of one step each, has
found that it computes what the eager step computes and takes less time: eager code on packed weights is hard to beat
for some models and sizes.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Series
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from engine.compile.compiler import Compiler, Failure, Package
from engine.compile.skeleton import take_skeleton
from engine.compile.trial import Trials, compare_logits
from engine.config import CompileConfig
from engine.model import operators  # registers what compiled code calls
from engine.model.native_kernels import NativeKernels
from engine.model.native_step import kernels_of, native_step
from engine.model.paged_step import PagedStep
from engine.model.runner import StepProgram
from engine.model.step import Step, flat_step

logger = logging.getLogger(__name__)

MEASURED_ROUNDS = 3
assert operators.NAMESPACE


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Powers of two below it, and `max_rows` itself."""
    sizes = [1]
    while sizes[-1] * 2 < max_rows:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if max_rows == 1 else (*sizes, max_rows)


Call = Callable[[list[torch.Tensor]], Series[torch.Tensor]]  # [*tensors, ids, positions] -> [logits]


def load_package(package: Package) -> Call:
    """Compiled code, to be called; raises RuntimeError where it cannot be loaded."""
    # One thread calls it, and its bookkeeping for several asks events whether they are done, which breaks a capture.
    return torch._inductor.aoti_load_package(str(package.path), run_single_threaded=True).loader.run


class CompiledCode:
    """One bucket's code with the model's tensors.

    Args:
        size: rows of its steps.
        call: the code.
        tensors: the model's, in the order of the skeleton.
        kernels: our own, where the code was made for them.
    """

    def __init__(
        self, size: int, call: Call, tensors: list[torch.Tensor], kernels: NativeKernels | None = None
    ) -> None:
        self.size = size
        self._call = call
        self._tensors = tensors
        self._kernels = kernels

    def run(self, step: Step) -> torch.Tensor:
        """As StepProgram.run, for a step of at most `size` single tokens."""
        inputs = step.inputs
        num_rows = inputs.input_ids.shape[1]
        ids, positions = inputs.input_ids, inputs.position_ids
        # Generated kernels take aligned addresses for granted; to pad by nothing is to copy.
        if num_rows < self.size or any(tensor.data_ptr() % 16 for tensor in (ids, positions)):
            ids, positions = (F.pad(tensor, (0, self.size - num_rows)) for tensor in (ids, positions))
        with flat_step(step), self._native(step):
            logits: torch.Tensor = self._call([*self._tensors, ids, positions])[0]
        return logits[:num_rows] if inputs.logit_rows.shape[0] == num_rows else logits[inputs.logit_rows]

    def _native(self, step: Step) -> AbstractContextManager[None]:
        if self._kernels is None or isinstance(step, PagedStep):
            return nullcontext()
        return native_step(self._kernels, step.inputs)


class CompiledSteps:
    """A program that runs decode steps compiled where it can.

    Args:
        program: the eager one.
        tensors: the model's, as take_skeleton gave them.
        compiler: of the program's skeleton.
        setting: what trials are made of.
        sizes: the buckets, ascending.
        kernels: our own, where the model has them.
        load, measure: of a package and of a step's seconds; for tests.
    """

    def __init__(
        self,
        program: StepProgram,
        tensors: list[torch.Tensor],
        compiler: Compiler,
        setting: Trials,
        sizes: Series[int],
        *,
        kernels: NativeKernels | None = None,
        load: Callable[[Package], Call] = load_package,
        measure: Callable[[StepProgram | CompiledCode, Step], float] | None = None,
    ) -> None:
        self.program = program
        self.model = program.model
        self._tensors = tensors
        self._compiler = compiler
        self._setting = setting
        self._kernels = kernels
        self._load = load
        self._measure = measure or _time
        self._live: dict[int, CompiledCode] = {}
        self._trial: Iterator[None] | None = None
        self._again: set[int] = set()  # sizes that have had their second chance
        self._num_decided = 0
        compiler.request(sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The buckets that serve."""
        return tuple(sorted(self._live))

    @property
    def num_decided(self) -> int:
        """Of the buckets: they serve, or never will."""
        return self._num_decided

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """None: nothing is captured here."""
        return ()

    def run(self, step: Step) -> torch.Tensor:
        """As StepProgram.run."""
        code = self._code_for(step)
        if code is None:
            return self.program.run(step)
        try:
            return code.run(step)
        except Exception:
            logger.exception("compiled steps of %d sequences failed; eager from here on", code.size)
            del self._live[code.size]
            if not isinstance(step, PagedStep) and step.cross is not None:
                step.cross.num_calls = 0
            return self.program.run(step)

    def code_of(self, size: int) -> CompiledCode | None:
        """The code of a bucket that serves."""
        return self._live.get(size)

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Call `wake`, on any thread, when has_work becomes true."""
        self._compiler.wake_with(wake)

    def has_work(self) -> bool:
        """Whether advance() has something to do."""
        return self._trial is not None or self._compiler.has_results()

    def advance(self) -> None:
        """Go on with what the compiler has made, for the time of about one step."""
        if self._trial is None:
            result = self._compiler.take()
            if isinstance(result, Failure):
                self._num_decided += 1
                logger.warning("steps of %d sequences stay eager: %s", result.size, result.reason)
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

    def _code_for(self, step: Step) -> CompiledCode | None:
        if not self._live or not _is_decode(step):
            return None
        num_rows = step.inputs.input_ids.shape[1]
        sizes = [size for size in self._live if size >= num_rows]
        return self._live[min(sizes)] if sizes else None

    def _try(self, package: Package) -> Iterator[None]:
        """Load, compare, measure; one step between two yields."""
        size = package.size
        try:
            code = CompiledCode(size, self._load(package), self._tensors, self._kernels)
            yield
            error = 0.0
            for num_rows in sorted({size, size // 2 + 1}):
                steps = self._setting.steps(num_rows)
                expected = self.program.run(steps())
                yield
                error = max(error, compare_logits(code.run(steps()), expected))
                yield
        except Exception as failure:  # whatever compiled code does, the server goes on without it
            self._give_up(package, failure)
            return
        taken = {id(code): float("inf"), id(self.program): float("inf")}
        for _ in range(MEASURED_ROUNDS):
            for program in (self.program, code):
                taken[id(program)] = min(taken[id(program)], self._measure(program, steps()))
                yield
        eager_ms, compiled_ms = 1e3 * taken[id(self.program)], 1e3 * taken[id(code)]
        origin = "found on disk" if package.seconds is None else f"compiled in {package.seconds:.0f} s"
        self._num_decided += 1
        if compiled_ms >= eager_ms:
            logger.info(
                "steps of %d sequences stay eager: %.1f ms, compiled %.1f (%s)", size, eager_ms, compiled_ms, origin
            )
            return
        self._live[size] = code
        logger.info(
            "steps of up to %d sequences are compiled: %.1f ms instead of %.1f, equal within %.1e (%s)",
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
            logger.warning("steps of %d sequences stay eager: %s", package.size, words)


def compile_steps(program: StepProgram, setting: Trials, config: CompileConfig, max_rows: int) -> CompiledSteps:
    """The program, to be compiled behind.

    Raises:
        ValueError: the model cannot be handed to another process.
    """
    kernels = kernels_of(program.model)
    try:
        skeleton, tensors = take_skeleton(program, program.model, is_native=kernels is not None)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"--torch-compile True: this model cannot be taken apart: {error}") from error
    compiler = Compiler(skeleton, config.directory, is_autotuned=config.is_autotuned)
    return CompiledSteps(program, tensors, compiler, setting, config.sizes or bucket_sizes(max_rows), kernels=kernels)


def _is_decode(step: Step) -> bool:
    """Whether every sequence has one token in it."""
    if isinstance(step, PagedStep):
        return step.inputs.num_singles == len(step.inputs.query_lens)
    return not step.inputs.chunks and (step.cross is None or not step.cross.chunks)


def _time(program: StepProgram | CompiledCode, step: Step) -> float:
    """Seconds that a step takes."""
    started = time.perf_counter()
    logits = program.run(step)
    if logits.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
