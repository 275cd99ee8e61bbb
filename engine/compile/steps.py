"""Decode steps by compiled code where that is there, right and faster; eager everywhere else.

Knows nothing of scheduling or sampling; what compiles is compile/compiler.py.
Stands in the place of a lane's own program: the runners call run, engine.py gives it moments between steps.

Code is compiled for certain numbers of rows. A step runs in the smallest bucket that it fits, with rows that belong to
nobody behind its own. Each bucket is tried before it serves (compile/tried.py).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from collections.abc import Sequence as Series

import torch
import torch.nn.functional as F

from engine.compile.compiler import Compiler, Package
from engine.compile.skeleton import take_skeleton
from engine.compile.trial import Trials, compare_logits
from engine.compile.tried import Call, Runs, TriedCode, load_package, time_run
from engine.config import CompileConfig
from engine.model import operators  # registers what compiled code calls
from engine.model.native_kernels import NativeKernels
from engine.model.native_step import kernels_of, native_attention
from engine.model.paged_step import PagedStep
from engine.model.runner import StepProgram
from engine.model.step import Step, flat_step

assert operators.NAMESPACE


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Powers of two below it, and `max_rows` itself."""
    sizes = [1]
    while sizes[-1] * 2 < max_rows:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if max_rows == 1 else (*sizes, max_rows)


def sizes_of(how: CompileConfig, max_rows: int) -> tuple[int, ...]:
    """The buckets of a server of up to that many rows: as asked, or bucket_sizes."""
    return how.sizes or bucket_sizes(max_rows)


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
        with flat_step(step), native_attention(self._kernels, step):
            logits: torch.Tensor = self._call([*self._tensors, ids, positions])[0]
        return logits[:num_rows] if inputs.logit_rows.shape[0] == num_rows else logits[inputs.logit_rows]


class CompiledSteps(TriedCode[Step, CompiledCode]):
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

    what = "steps of %d sequences"

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
        measure: Callable[[Runs[Step], Step], float] | None = None,
    ) -> None:
        super().__init__(program, compiler, load=load, measure=measure or time_run)
        self.program = program
        self.model = program.model
        self._tensors = tensors
        self._setting = setting
        self._kernels = kernels
        compiler.request(sizes)

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
            self._drop(code.size)
            if not isinstance(step, PagedStep) and step.cross is not None:
                step.cross.num_calls = 0
            return self.program.run(step)

    def code_of(self, size: int) -> CompiledCode | None:
        """The code of a bucket that serves."""
        return self._live.get(size)

    def _code_for(self, step: Step) -> CompiledCode | None:
        if not self._live or not _is_decode(step):
            return None
        num_rows = step.inputs.input_ids.shape[1]
        sizes = [size for size in self._live if size >= num_rows]
        return self._live[min(sizes)] if sizes else None

    def _code(self, size: int, call: Call) -> CompiledCode:
        return CompiledCode(size, call, self._tensors, self._kernels)

    def _samples(self, size: int) -> list[Callable[[], Step]]:
        """Of half the rows too: those behind belong to nobody."""
        return [self._setting.steps(num_rows) for num_rows in sorted({size, size // 2 + 1})]

    def _compare(self, got: torch.Tensor, expected: torch.Tensor, given: Step) -> float:
        return compare_logits(got, expected)


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
    return CompiledSteps(program, tensors, compiler, setting, sizes_of(config, max_rows), kernels=kernels)


def _is_decode(step: Step) -> bool:
    """Whether every sequence has one token in it."""
    if isinstance(step, PagedStep):
        return step.inputs.num_singles == len(step.inputs.query_lens)
    return not step.inputs.chunks and (step.cross is None or not step.cross.chunks)
