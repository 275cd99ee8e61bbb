"""Encoders by compiled code where that is there, right and faster; eager everywhere else.

Knows nothing of sources, slots or decoders; what compiles is compile/compiler.py, how code is tried compile/tried.py.
Stands in the place of an encoder's own program: model/encoder.py calls run, engine.py gives it moments between steps.

Code is compiled for certain numbers of sources. A spectrogram has one length; texts may have any that the code was made
for, padded to the longest of a batch as for the eager encoder.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass
from functools import partial

import torch

from engine.compile.compiler import Compiler, Package
from engine.compile.skeleton import SourceShape, take_skeleton
from engine.compile.tried import Call, Runs, TriedCode, load_package, time_run
from engine.config import CompileConfig
from engine.model import operators  # registers what compiled code calls
from engine.model.encoder import EncoderInputs, PlainEncoder
from engine.model.native_kernels import NativeKernels
from engine.model.native_step import kernels_of
from engine.model.selfcheck import judge, row_errors

MAX_SOURCES = 4
"""Larger batches keep every core busy by themselves, and their code would take as long to compile."""

_TRIAL_LENGTHS = (17, 64)
assert operators.NAMESPACE


@dataclass(frozen=True, slots=True)
class EncoderCode:
    """One size's code with the encoder's tensors, and our kernels, where it calls them."""

    size: int
    call: Call
    tensors: list[torch.Tensor]
    kernels: NativeKernels | None

    def run(self, inputs: EncoderInputs, /) -> torch.Tensor:
        """As EncoderProgram.run, for `size` sources."""
        if self.kernels is not None:
            self.kernels.follow_threads()
        more = () if inputs.mask is None else (inputs.mask,)
        return self.call([*self.tensors, inputs.values, *more])[0]


class CompiledEncoder(TriedCode[EncoderInputs, EncoderCode]):
    """An encoder that runs compiled where it can.

    Args:
        program: the eager one.
        tensors: the encoder's, as take_skeleton gave them.
        compiler: of its skeleton.
        source: what one source is.
        sizes: numbers of sources, ascending.
        may_start: whether compiling may begin: one thing is compiled at a time.
        kernels: our own, where the encoder has them.
        load, measure: of a package and of a run's seconds; for tests.
    """

    what = "encoders of %d sources"
    num_rounds = 2  # a window of speech takes seconds

    def __init__(
        self,
        program: PlainEncoder,
        tensors: list[torch.Tensor],
        compiler: Compiler,
        source: SourceShape,
        sizes: Series[int],
        *,
        may_start: Callable[[], bool] = lambda: True,
        kernels: NativeKernels | None = None,
        load: Callable[[Package], Call] = load_package,
        measure: Callable[[Runs[EncoderInputs], EncoderInputs], float] = time_run,
    ) -> None:
        super().__init__(program, compiler, load=load, measure=measure)
        self._tensors = tensors
        self._source = source
        self._wanted = tuple(sizes)
        self._may_start = may_start
        self._kernels = kernels

    def run(self, inputs: EncoderInputs, /) -> torch.Tensor:
        """As EncoderProgram.run."""
        code = self._live.get(inputs.values.shape[0])
        if code is None or not self._source.takes(inputs.values):
            return self._eager.run(inputs)
        try:
            return code.run(inputs)
        except Exception:
            self._drop(code.size)
            return self._eager.run(inputs)

    def has_work(self) -> bool:
        """Whether advance() has something to do."""
        return super().has_work() or (bool(self._wanted) and self._may_start())

    def advance(self) -> None:
        """Begin, or go on with what the compiler has made, for the time of about one run."""
        if self._wanted and self._may_start():
            self._compiler.request(self._wanted)
            self._wanted = ()
        super().advance()

    def _code(self, size: int, call: Call) -> EncoderCode:
        return EncoderCode(size, call, self._tensors, self._kernels)

    def _samples(self, size: int) -> list[Callable[[], EncoderInputs]]:
        lengths = (
            [None]
            if self._source.max_length is None
            else sorted({min(length, self._source.max_length) for length in _TRIAL_LENGTHS})
        )
        return [partial(self._sample, size, length) for length in lengths]

    def _sample(self, size: int, length: int | None) -> EncoderInputs:
        """Random sources, the same each time; of texts all but the first are shorter than the batch."""
        generator, source = torch.Generator().manual_seed(0), self._source
        if length is None:
            values = torch.randn((size, *source.shape), generator=generator)
            return EncoderInputs(values.to(source.device, source.dtype), None)
        ids = torch.randint(1, source.vocab_size, (size, length), generator=generator)
        lengths = torch.tensor([max(1, length - 5 * row) for row in range(size)])[:, None]
        mask = (torch.arange(length)[None] < lengths).to(torch.int64)
        return EncoderInputs((ids * mask).to(source.device), mask.to(source.device))

    def _compare(self, got: torch.Tensor, expected: torch.Tensor, given: EncoderInputs) -> float:
        """Of padding nothing is asked."""
        if given.mask is not None:
            is_real = given.mask.bool()
            got, expected = got[is_real], expected[is_real]
        return judge(row_errors(got.flatten(0, -2), expected.flatten(0, -2)), expected.dtype)


def compile_encoder(
    program: PlainEncoder, source: SourceShape, config: CompileConfig, max_sources: int, may_start: Callable[[], bool]
) -> CompiledEncoder:
    """The encoder, to be compiled behind.

    Raises:
        ValueError: it cannot be handed to another process.
    """
    kernels = kernels_of(program.model)
    try:
        skeleton, tensors = take_skeleton(program, program.model, is_native=kernels is not None, source=source)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"--torch-compile True: this model's encoder cannot be taken apart: {error}") from error
    sizes = [size for size in config.sizes or (1, 2, MAX_SOURCES) if size <= min(max_sources, MAX_SOURCES)]
    compiler = Compiler(skeleton, config.directory, is_autotuned=config.is_autotuned)
    return CompiledEncoder(program, tensors, compiler, source, sizes, may_start=may_start, kernels=kernels)
