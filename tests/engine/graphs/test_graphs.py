"""Captured steps give the eager ones' tokens, and whatever goes wrong with capturing the server goes on."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Batch, ScheduledSequence
from engine.build_paged import build_paged
from engine.compile.paged_trial import NUM_TRIAL_BLOCKS, trial_layout
from engine.config import CompileConfig, EngineConfig
from engine.engine import Engine
from engine.graphs.recorder import Compute, recorder_for
from engine.graphs.static_inputs import StaticInputs
from engine.graphs.steps import GraphedSteps
from engine.kv.prefix import BLOCK_SIZE
from engine.model.loader import describe
from engine.model.paged_attention import attend_blocks
from engine.model.paged_inputs import lay_out
from engine.model.paged_runner import PagedRunner
from engine.model.selfcheck import choose_lane
from engine.sampling.sampler import Sampler
from engine.sequence import SamplingParams, Sequence
from tests import zoo
from tests.engine.compile.inline import compile_here
from tests.engine.graphs.twin import NotCapturable, StaleReplay, Stopwatch, TwinRecorder
from tests.engine.harness import drive, greedy, reference, tiny_model, tokens

FAMILIES = ["llama", "mistral", "gemma2", "deepseek_v3"]
LENGTHS = (5, 40, 90, 3, 70, 1, 64, 33)
NUM_TOKENS = 20


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs alone, unless a test says otherwise; and each is taken to be the faster."""
    monkeypatch.setattr("engine.compile.compiler.Compiler.request", lambda *_: None)
    monkeypatch.setattr("engine.graphs.steps.time_compute", Stopwatch())


def graphed(name: str, recorder: Any, directory: Path, sizes: tuple[int, ...] | None = None, **limits: Any) -> Engine:
    how = CompileConfig(directory, has_graphs=True, sizes=sizes)
    config = EngineConfig(
        **{"max_num_seqs": 4, "max_batch_tokens": 256, "max_model_len": 256, "compile": how, **limits}
    )
    loaded = describe(tiny_model(name))
    sampler = Sampler(loaded.vocab_size, loaded.eos_token_ids, loaded.device, is_deferring=config.is_overlapped)
    with torch.inference_mode():
        choice = choose_lane(loaded.model, loaded.device)
        engine = build_paged(loaded, config, choice, sampler, attend_blocks, recorder)
    assert engine is not None
    return engine


def captured(engine: Engine) -> Engine:
    """Once nothing is left to capture."""
    while engine.has_work():
        assert engine.step() == []
    return engine


def prompts() -> list[list[int]]:
    return [zoo.prompt(length, seed=number) for number, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_generate_as_sequences_come_and_go(name: str, tmp_path: Path) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in prompts()]
    recorder = TwinRecorder()
    engine = graphed(name, recorder, tmp_path, max_batch_tokens=64)
    for _ in range(2):  # the first time while graphs are captured, the second time with every prefix computed
        outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts())])
        assert [tokens(outputs[n]) for n in range(8)] == expected
    assert recorder.sizes == [4, 2, 1]  # the largest first
    assert set(recorder.replayed) == {1, 2, 4}
    assert engine.stats().graph_batch_sizes == (1, 2, 4)
    assert engine.stats().prefix_cache_hits_total > 0
    assert isinstance(engine.compiled, GraphedSteps) and engine.compiled.graph_sizes == (1, 2, 4)  # none has failed


def test_captured_steps_that_overlap_give_the_same_tokens(tmp_path: Path) -> None:
    expected = [reference("llama", prompt, NUM_TOKENS) for prompt in prompts()]
    recorder = TwinRecorder()
    engine = captured(graphed("llama", recorder, tmp_path, is_overlapped=True))
    num_ahead = 0
    plan = engine.pipeline.next_batch

    def count(items: tuple[ScheduledSequence, ...]) -> Batch | None:
        nonlocal num_ahead
        batch = plan(items)
        num_ahead += batch is not None
        return batch

    engine.pipeline.next_batch = count  # type: ignore[method-assign]
    outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts())], stagger=5)
    assert [tokens(outputs[n]) for n in range(8)] == expected
    assert recorder.replayed and num_ahead > 20


def test_every_number_of_rows_runs_in_the_smallest_graph_that_it_fits(tmp_path: Path) -> None:
    recorder = TwinRecorder()
    engine = captured(graphed("llama", recorder, tmp_path, sizes=(1, 2, 3, 5), max_num_seqs=6))
    for num_rows in range(1, 7):
        recorder.replayed.clear()
        sequences = [greedy(n, zoo.prompt(9, seed=n), 8) for n in range(num_rows)]
        for sequence in sequences:
            engine.add(sequence)
        outputs = _finish(engine, sequences)
        assert outputs == [reference("llama", zoo.prompt(9, seed=n), 8) for n in range(num_rows)]
        smallest = {1: {1}, 2: {2}, 3: {3}, 4: {5}, 5: {5}, 6: set()}[num_rows]
        assert set(recorder.replayed) == smallest


def _finish(engine: Engine, sequences: list[Sequence]) -> list[list[int]]:
    while engine.has_work():
        engine.step()
        engine.kv.check_integrity()
    return [list(sequence.output_token_ids) for sequence in sequences]


def test_preemption_and_a_budget_change_nothing(tmp_path: Path) -> None:
    expected = [reference("llama", zoo.prompt(12, seed=n), 60) for n in range(4)]
    budget = (7 + NUM_TRIAL_BLOCKS) * BLOCK_SIZE * 512
    engine = captured(graphed("llama", TwinRecorder(), tmp_path, kv_budget_bytes=budget))
    assert isinstance(engine.runner, PagedRunner) and engine.runner.storage.num_bytes == budget
    outputs = drive(engine, [greedy(n, zoo.prompt(12, seed=n), 60) for n in range(4)])
    assert [tokens(outputs[n]) for n in range(4)] == expected
    assert engine.stats().preemptions_total > 0 and engine.stats().graph_batch_sizes == (1, 2, 4)


def test_a_budget_that_holds_only_the_spare_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes 16384 bytes, and captured steps need 2 more"):
        graphed("llama", TwinRecorder(), tmp_path, kv_budget_bytes=2 * 16384)


def test_a_static_cache_is_captured_over(tmp_path: Path) -> None:
    expected = [reference("llama", prompt, NUM_TOKENS) for prompt in prompts()]
    recorder = TwinRecorder()
    engine = captured(graphed("llama", recorder, tmp_path, is_static_cache=True, max_model_len=110))
    outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts())])
    assert [tokens(outputs[n]) for n in range(8)] == expected
    assert recorder.replayed and engine.stats().kv_bytes_allocated == 4 * 128 * engine.lane.kv_bytes_per_token


def test_storage_that_is_emptied_after_a_failure_is_still_what_graphs_read(tmp_path: Path) -> None:
    recorder = TwinRecorder()
    engine = captured(graphed("llama", recorder, tmp_path))
    prompt = zoo.prompt(40)
    engine.add(greedy(0, prompt, 20))
    engine.step()
    apply = engine.runner.apply

    def fail_once(ops: Iterable[Any]) -> None:
        engine.runner.apply = apply  # type: ignore[method-assign]
        raise RuntimeError("lost")

    engine.runner.apply = fail_once  # type: ignore[method-assign]
    assert engine.step()[0].error is not None
    recorder.replayed.clear()
    assert tokens(drive(engine, [greedy(1, prompt, 20)])[1]) == reference("llama", prompt, 20)
    assert recorder.replayed and engine.stats().graph_batch_sizes == (1, 2, 4)
    engine.on_idle()
    assert tokens(drive(engine, [greedy(2, prompt, 20)])[2]) == reference("llama", prompt, 20)


def test_storage_that_moves_would_be_noticed_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The twin is no good if it misses what it is for."""
    engine = captured(graphed("llama", TwinRecorder(), tmp_path))
    runner = engine.runner
    assert isinstance(runner, PagedRunner)
    runner.storage.keys[1] = runner.storage.keys[1].clone()
    drive(engine, [greedy(0, zoo.prompt(5), 4)])
    assert StaleReplay.__name__ in caplog.text and engine.stats().graph_batch_sizes == ()


def test_rows_of_a_step_that_want_no_logits_get_none(tmp_path: Path) -> None:
    prompt = zoo.prompt(9)
    engine = captured(graphed("llama", TwinRecorder(), tmp_path, max_batch_tokens=1))
    outputs = drive(engine, [greedy(0, prompt, 6)])  # each step is one token, of the prompt too
    assert tokens(outputs[0]) == reference("llama", prompt, 6)
    assert engine.stats().graph_batch_sizes == (1, 2, 4)


def test_a_step_that_cannot_be_captured_stays_eager(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = graphed("llama", TwinRecorder(), tmp_path)
    model = engine.runner.program.model  # type: ignore[attr-defined]
    model.register_forward_pre_hook(lambda *_: bool(torch.ones(1).any()) and None)
    prompt = zoo.prompt(9)
    assert tokens(drive(engine, [greedy(0, prompt, 6)])[0]) == reference("llama", prompt, 6)
    assert engine.stats().graph_batch_sizes == ()
    assert "steps of 4 sequences are not captured around the eager step, nor any that were left: NotCapt" in caplog.text
    assert NotCapturable.__name__ in caplog.text


class WrongRecorder(TwinRecorder):
    """Its graphs of one size compute something else."""

    def record(self, compute: Compute) -> Compute:
        replay = super().record(compute)
        return (lambda: replay().flip(1)) if self.sizes[-1] == 2 else replay


def test_a_graph_that_computes_something_else_never_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = captured(graphed("llama", WrongRecorder(), tmp_path))
    assert engine.stats().graph_batch_sizes == (1, 4)
    assert "the graph of 2 sequences around the eager step does not serve" in caplog.text


def test_a_graph_that_is_slower_never_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.graphs.steps.time_compute", lambda compute: float(compute().numel()))
    assert captured(graphed("llama", TwinRecorder(), tmp_path)).stats().graph_batch_sizes == ()


def test_tokens_that_only_the_device_knows_take_the_place_of_the_hosts() -> None:
    static = StaticInputs(4, 3, 7, torch.device("cpu"))
    address = static.inputs.input_ids.data_ptr()
    sequences = [Sequence(n, [50 + n] * (40 + n), SamplingParams(max_tokens=1), 0.0) for n in range(2)]
    tables = (array("q", (5, 2)), array("q", (0, 1)))
    batch = Batch(tuple(ScheduledSequence(s, s.num_tokens - 1, 1, 1) for s in sequences))
    layout = lay_out(batch, lambda sequence: tables[sequence.sequence_id])
    static.fill(layout)
    inputs = static.inputs
    assert inputs.input_ids.tolist() == [[50, 51, 0, 0]]
    assert inputs.position_ids.tolist() == [[39, 40, 0, 0]]
    assert inputs.slot_mapping.tolist() == [2 * 32 + 7, 32 + 8, 7 * 32, 7 * 32]
    assert inputs.context_lens.tolist() == [40, 41, 1, 1]
    assert inputs.block_tables.tolist() == [[5, 2, 0], [0, 1, 0], [7, 0, 0], [7, 0, 0]]
    static.fill(layout, torch.tensor([8, 9]))
    assert inputs.input_ids.tolist() == [[8, 9, 0, 0]]
    assert inputs.input_ids.data_ptr() == address
    for tensor in (inputs.input_ids, inputs.position_ids, inputs.slot_mapping, inputs.block_tables):
        assert tensor.is_contiguous() and (tensor.data_ptr() - address) % 128 == 0


def test_a_trial_writes_to_spare_blocks_alone_and_rows_that_meet_are_alike() -> None:
    layout = trial_layout(100, first_block=9, max_model_len=256, vocab_size=50)
    by_slot: dict[int, set[tuple[int, int]]] = {}
    for token, position, slot in zip(layout.input_ids, layout.position_ids, layout.slot_mapping, strict=True):
        by_slot.setdefault(int(slot), set()).add((int(token), int(position)))
    assert set(by_slot) == set(range(9 * BLOCK_SIZE, (9 + NUM_TRIAL_BLOCKS) * BLOCK_SIZE))
    assert all(len(rows) == 1 for rows in by_slot.values())
    assert by_slot[9 * BLOCK_SIZE] == {(0, 0)}
    assert {int(block) for table in layout.tables for block in table} == {9, 10}


def test_a_cpu_captures_nothing() -> None:
    assert recorder_for(torch.device("cpu")) is None


@pytest.mark.parametrize("name", ["llama"])
def test_graphs_are_captured_again_around_compiled_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    calls = compile_here(monkeypatch)
    recorder = TwinRecorder()
    engine = captured(graphed(name, recorder, tmp_path, sizes=(1, 4)))
    assert recorder.sizes == [4, 1, 1, 4]
    stats = engine.stats()
    assert (stats.compiled_batch_sizes, stats.graph_batch_sizes) == ((1, 4), (1, 4))
    assert "steps of up to 4 sequences are a graph around compiled code" in caplog.text
    calls.clear()
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in prompts()]
    outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts())])
    assert [tokens(outputs[n]) for n in range(8)] == expected
    assert set(calls) == {1, 4} and set(recorder.replayed) == {1, 4}
    assert engine.stats().graph_batch_sizes == (1, 4)
