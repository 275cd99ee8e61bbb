"""Steps "compiled" without a compiler: the traced graph itself is called, in this process.

Knows nothing of code generation; all else (skeletons, tracing, operators, padding, trials) is the real thing.
Called by the tests of compiled steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Series
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.compile.compiler import Compiler, Package
from engine.compile.encoder import CompiledEncoder, EncoderCode
from engine.compile.paged_trial import PagedTrialSetting
from engine.compile.skeleton import take_skeleton
from engine.compile.steps import CompiledCode, CompiledSteps
from engine.compile.tracing import trace
from engine.compile.trial import Trials, TrialSetting
from engine.compile.tried import Call, Runs, TriedCode
from engine.engine import Engine
from engine.model.native_step import kernels_of
from engine.model.paged_runner import PagedRunner
from engine.model.runner import FlatRunner
from engine.model.seq2seq import Seq2SeqRunner


class InlineCompiler(Compiler):
    """Has everything at once."""

    def request(self, sizes: Series[int]) -> None:
        self.requested = [*getattr(self, "requested", ()), *sizes]
        for size in sizes:
            self._report(Package(size, self.directory / str(size), None))


def quick(program: Runs[Any], given: Any) -> float:
    """Compiled code is always the faster."""
    program.run(given)
    return 0.5 if isinstance(program, CompiledCode | EncoderCode) else 1.0


def load_inline(tried: TriedCode[Any, Any], package: Package) -> Call:
    """The traced graph of a package."""
    skeleton = tried._compiler._skeleton
    graph, num_tensors = trace(skeleton, package.size).module(), len(skeleton.specs)

    def call(values: list[torch.Tensor]) -> Series[torch.Tensor]:
        found: Series[torch.Tensor] = graph(values[:num_tensors], *values[num_tensors:])
        return found

    return call


def compile_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have whatever engine is built compile at once, in this process; gains the rows of each call of compiled code."""
    calls: list[int] = []

    def load(steps: CompiledSteps, package: Package) -> Call:
        graph = load_inline(steps, package)

        def call(values: list[torch.Tensor]) -> Any:
            calls.append(values[-1].shape[1])
            return graph(values)

        return call

    init = CompiledSteps.__init__

    def with_load(steps: CompiledSteps, *args: Any, **kwargs: Any) -> None:
        init(steps, *args, **kwargs)
        steps._load = lambda package: load(steps, package)

    monkeypatch.setattr("engine.compile.steps.Compiler", InlineCompiler)
    monkeypatch.setattr("engine.compile.steps.time_run", quick)
    monkeypatch.setattr(CompiledSteps, "__init__", with_load)
    encode_here(monkeypatch)
    return calls


def encode_here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The same for the encoders of engines; gains the shape of what each call is given."""
    calls: list[tuple[int, ...]] = []

    def load(encoder: CompiledEncoder, package: Package) -> Call:
        graph, num_tensors = load_inline(encoder, package), len(encoder._tensors)

        def call(values: list[torch.Tensor]) -> Any:
            calls.append(tuple(values[num_tensors].shape))
            return graph(values)

        return call

    init = CompiledEncoder.__init__

    def with_load(encoder: CompiledEncoder, *args: Any, **kwargs: Any) -> None:
        init(encoder, *args, **kwargs)
        encoder._load = lambda package: load(encoder, package)
        encoder._measure = quick

    monkeypatch.setattr("engine.compile.encoder.Compiler", InlineCompiler)
    monkeypatch.setattr(CompiledEncoder, "__init__", with_load)
    return calls


def compile_inline(
    engine: Engine,
    directory: Path,
    sizes: Series[int],
    *,
    change: Callable[[Call], Call] = lambda call: call,
    **more: Any,
) -> CompiledSteps:
    """Give an engine compiled steps; `change` makes of each graph what is called in its place."""
    runner = engine.runner
    assert isinstance(runner, FlatRunner | Seq2SeqRunner | PagedRunner)
    program = runner.program
    kernels = kernels_of(program.model)
    skeleton, tensors = take_skeleton(program, program.model, is_native=kernels is not None)
    shapes, vocab_size = runner.storage.shapes, engine.sampler.vocab_size
    setting: Trials = TrialSetting(shapes, vocab_size, runner.device)
    if isinstance(runner, PagedRunner):
        setting = PagedTrialSetting(shapes, vocab_size, engine.config.max_model_len, runner.device, runner.attention)
    if isinstance(runner, Seq2SeqRunner):
        decoder = runner.decoder
        crossing = (runner.cross_storage.shapes, decoder.marker, decoder.biases)
        setting = TrialSetting(shapes, vocab_size, runner.device, *crossing)

    def load(package: Package) -> Call:
        graph = trace(skeleton, package.size).module()

        def call(values: list[torch.Tensor]) -> Series[torch.Tensor]:
            found: Series[torch.Tensor] = graph(values[:-2], values[-2], values[-1])
            return found

        return change(call)

    compiler = InlineCompiler(skeleton, directory, is_autotuned=False)
    options = {"load": load, "measure": quick, "kernels": kernels, **more}
    steps = CompiledSteps(program, tensors, compiler, setting, sizes, **options)
    runner.program = engine.compiled = steps
    return steps


def settle(engine: Engine, num_buckets: int) -> None:
    """Until that many buckets are decided."""
    end = time.monotonic() + 240
    assert engine.compiled is not None
    while engine.compiled.num_decided < num_buckets:
        assert time.monotonic() < end, "nothing is decided"
        if engine.has_work():
            engine.step()
        else:
            time.sleep(0.02)
