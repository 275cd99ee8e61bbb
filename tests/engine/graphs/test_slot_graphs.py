"""Captured steps of encoder-decoders give the eager ones' tokens, over slots that never move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.batch import Batch, ScheduledSequence
from engine.compile.trial import CAPACITY
from engine.config import CompileConfig
from engine.engine import Engine
from engine.graphs.slot_scene import SlotScene
from engine.graphs.steps import GraphedSteps
from engine.kv.pool import ResizeArena, Slot
from engine.kv.slots import LayerShape, SlotStorage
from engine.model.attention import AttentionCall, attend_flat
from engine.model.inputs import build_inputs
from engine.model.seq2seq import Seq2SeqRunner
from engine.model.slot_rows import SlotRows, lay_out_rows
from engine.sequence import SamplingParams, Sequence, TimestampRules, TokenRules
from tests import zoo_seq2seq as zoo
from tests.engine.compile.inline import compile_here
from tests.engine.graphs.twin import StaleReplay, Stopwatch, TwinRecorder
from tests.engine.harness import drive, tokens
from tests.engine.test_exact_seq2seq import (
    LENGTHS,
    NUM_TOKENS,
    engine_of,
    generate_speech,
    model_of,
    sequence,
    sources,
    speech,
    text,
)
from tests.zoo import prompt

SIZES = (1, 2, 4)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwinRecorder]:
    """What captures on this CPU; each capture is taken to be the faster."""
    twin = TwinRecorder()
    monkeypatch.setattr("engine.build.recorder_for", lambda _device: twin)
    monkeypatch.setattr("engine.graphs.steps.time_compute", Stopwatch())
    yield twin


def graphed(name: str, directory: Path, **limits: Any) -> Engine:
    has_code = limits.pop("has_code", False)
    how = CompileConfig(directory, has_code=has_code, has_graphs=True, sizes=limits.pop("sizes", None))
    return engine_of(name, **{"max_num_seqs": 4, "compile": how, **limits})


def captured(engine: Engine) -> Engine:
    """Once nothing is left to capture."""
    while engine.has_work():
        assert engine.step() == []
    return engine


def addresses(engine: Engine) -> list[int]:
    runner = engine.runner
    assert isinstance(runner, Seq2SeqRunner)
    arenas = [arena for storage in (runner.storage, runner.cross_storage) for arena in storage.arenas.values()]
    return [tensor.data_ptr() for arena in arenas for tensor in (*arena.keys, *arena.values)]


@pytest.mark.parametrize(
    ("name", "is_overlapped"),
    [*((name, False) for name in ("t5", "umt5", "bart", "m2m_100")), ("t5", True), ("bart", True)],
)
def test_tokens_are_those_of_generate_as_sequences_of_different_sources_come_and_go(
    name: str, is_overlapped: bool, recorder: TwinRecorder, tmp_path: Path
) -> None:
    expected = [zoo.generate(model_of(name), ids, NUM_TOKENS) for ids in sources()]
    assert zoo.is_diverse(expected)
    engine = graphed(name, tmp_path, is_overlapped=is_overlapped)
    for stagger in (2, 1):  # the first time while graphs are captured
        outputs = drive(engine, [sequence(n, text(ids)) for n, ids in enumerate(sources())], stagger=stagger)
        assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected
        engine.on_idle()
    assert recorder.sizes == [4, 2, 1]
    assert set(recorder.replayed) == set(SIZES)
    assert engine.stats().graph_batch_sizes == SIZES  # none has failed


@pytest.mark.parametrize("is_overlapped", [False, True])
def test_whisper_gives_generates_tokens(is_overlapped: bool, recorder: TwinRecorder, tmp_path: Path) -> None:
    prompts = [[zoo.START_ID], prompt(4, seed=1), prompt(30, seed=2), prompt(2, seed=3), prompt(11, seed=4)]
    expected = [generate_speech(model_of("whisper"), n, ids, NUM_TOKENS) for n, ids in enumerate(prompts)]
    engine = graphed("whisper", tmp_path, is_overlapped=is_overlapped, max_batch_tokens=16)
    for stagger in (3, 1):
        outputs = drive(engine, [sequence(n, speech(n), ids) for n, ids in enumerate(prompts)], stagger=stagger)
        assert [tokens(outputs[n]) for n in range(len(prompts))] == expected
    assert set(recorder.replayed) == set(SIZES) and engine.stats().graph_batch_sizes == SIZES


def test_rules_of_speech_choose_as_they_do_over_eager_steps(recorder: TwinRecorder, tmp_path: Path) -> None:
    first_id = 160
    rules = TokenRules((3, 4), (5,), timestamps=TimestampRules(first_id, 150, first_id - 1, 8))
    params = SamplingParams(12, temperature=0.0, num_logprobs=2, token_rules=rules)
    plain, fast = engine_of("whisper"), captured(graphed("whisper", tmp_path))
    found = [
        drive(engine, [sequence(n, speech(n), prompt(5 + n), params=params) for n in range(4)])
        for engine in (plain, fast)
    ]
    for number in range(4):
        assert tokens(found[0][number]) == tokens(found[1][number])
        assert first_id <= tokens(found[1][number])[0] <= first_id + 8
    assert recorder.replayed


def test_every_number_of_rows_runs_in_the_smallest_graph_that_it_fits(recorder: TwinRecorder, tmp_path: Path) -> None:
    engine = captured(graphed("t5", tmp_path, sizes=(1, 2, 3, 5, 9), max_num_seqs=6))
    assert engine.stats().graph_batch_sizes == (1, 2, 3, 5)  # no step has 9 rows
    expected = [zoo.generate(model_of("t5"), ids, 8) for ids in sources()[:6]]
    for num_rows in range(1, 7):
        recorder.replayed.clear()
        batch = [sequence(n, text(ids)) for n, ids in enumerate(sources()[:num_rows])]
        for member in batch:
            engine.add(member)
        while engine.has_work():
            engine.step()
        assert [member.output_token_ids[:8] for member in batch] == expected[:num_rows]
        assert set(recorder.replayed) == {1: {1}, 2: {2}, 3: {3}, 4: {5}, 5: {5}, 6: set()}[num_rows]


def test_sequences_of_one_source_read_one_slot(recorder: TwinRecorder, tmp_path: Path) -> None:
    starts = [[zoo.START_ID], [zoo.START_ID, 9], [zoo.START_ID, 30, 31]]
    expected = [zoo.generate(model_of("bart"), sources()[1], NUM_TOKENS, prompt=start) for start in starts]
    other = zoo.generate(model_of("bart"), sources()[2], NUM_TOKENS)
    engine = captured(graphed("bart", tmp_path))
    batch = [sequence(n, text(sources()[1]), start) for n, start in enumerate(starts)]
    outputs = drive(engine, [*batch, sequence(3, text(sources()[2]))], stagger=1)
    assert [tokens(outputs[n]) for n in range(4)] == [*expected, other]
    assert 4 in recorder.replayed and engine.stats().prefix_cache_hits_total >= 2 * LENGTHS[1]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_sequence_that_was_preempted_goes_on(name: str, recorder: TwinRecorder, tmp_path: Path) -> None:
    """Slots of the full length for everybody never force it: here it is called for."""
    expected = [zoo.generate(model_of(name), ids, NUM_TOKENS) for ids in sources()[:4]]
    engine = captured(graphed(name, tmp_path))
    batch = [sequence(n, text(ids)) for n, ids in enumerate(sources()[:4])]
    for member in batch:
        engine.add(member)
    for steps in range(200):
        if steps in (7, 12):
            engine.scheduler._preempt(engine.scheduler.running[steps % 3])
        engine.step()
        engine.kv.check_integrity()
    assert [member.output_token_ids for member in batch] == expected
    assert engine.stats().preemptions_total == 2 and engine.stats().graph_batch_sizes == SIZES


@pytest.mark.parametrize("is_static_cache", [False, True])
def test_slots_are_made_once_and_stay_where_they_are(
    is_static_cache: bool, recorder: TwinRecorder, tmp_path: Path
) -> None:
    engine = captured(graphed("t5", tmp_path, is_static_cache=is_static_cache, max_model_len=48, max_source_len=64))
    before = addresses(engine)
    assert engine.stats().kv_bytes_allocated == engine.lane.kv_bytes_per_token * 4 * (48 + 64)
    apply = engine.runner.apply

    def fail_once(ops: Iterable[Any]) -> None:
        engine.runner.apply = apply  # type: ignore[method-assign]
        raise RuntimeError("lost")

    engine.add(sequence(0, text(sources()[1])))
    engine.step()
    engine.runner.apply = fail_once  # type: ignore[method-assign]
    assert engine.step()[0].error is not None
    recorder.replayed.clear()
    outputs = drive(engine, [sequence(n, text(ids)) for n, ids in enumerate(sources()) if n != 6], stagger=1)
    engine.on_idle()
    for number, ids in enumerate(sources()):
        if number != 6:
            assert tokens(outputs[number]) == zoo.generate(model_of("t5"), ids, NUM_TOKENS)
    assert addresses(engine) == before and recorder.replayed and engine.stats().graph_batch_sizes == SIZES


def test_storage_that_moves_would_be_noticed_here(
    recorder: TwinRecorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = captured(graphed("bart", tmp_path))
    assert isinstance(engine.runner, Seq2SeqRunner)
    (arena,) = engine.runner.cross_storage.arenas.values()
    arena.keys[1] = arena.keys[1].clone()
    drive(engine, [sequence(0, text(sources()[0]))])
    assert StaleReplay.__name__ in caplog.text and engine.stats().graph_batch_sizes == ()


def test_a_budget_that_does_not_hold_every_slot_leaves_steps_eager_and_slots_elastic(
    recorder: TwinRecorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    per_token = engine_of("t5").lane.kv_bytes_per_token
    needed = 5 * (128 + 128) * per_token
    engine = graphed("t5", tmp_path, kv_budget_bytes=needed - 1)
    assert f"5 of 128 and 128 positions would take {needed} bytes, and {needed - 1} are free for it" in caplog.text
    assert not engine.has_work() and engine.stats().kv_bytes_allocated == 0
    outputs = drive(engine, [sequence(0, text(sources()[1]))])
    assert tokens(outputs[0]) == zoo.generate(model_of("t5"), sources()[1], NUM_TOKENS)
    assert recorder.sizes == []
    assert captured(graphed("t5", tmp_path, kv_budget_bytes=needed)).stats().graph_batch_sizes == SIZES


def test_a_sequence_that_aligns_is_computed_eagerly(recorder: TwinRecorder, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=0, is_aligning=True)
    aligned = [sequence(n, speech(3), prompt(12, seed=8), params=params) for n in range(2)]
    engine = captured(graphed("whisper", tmp_path, max_batch_tokens=1))
    recorder.replayed.clear()
    drive(engine, aligned[:1])
    assert not recorder.replayed
    drive(engine_of("whisper"), aligned[1:])
    found, expected = (np.concatenate(member.alignment, axis=1) for member in aligned)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_step_that_wants_no_logits_of_some_rows_gives_those_of_others(recorder: TwinRecorder, tmp_path: Path) -> None:
    begun = [zoo.START_ID, *prompt(9, seed=5)]
    engine = captured(graphed("bart", tmp_path, max_batch_tokens=2))  # the prompt is computed token by token
    batch = [sequence(0, text(sources()[1])), sequence(1, text(sources()[2]), begun)]
    outputs = drive(engine, batch, stagger=1)
    assert tokens(outputs[0]) == zoo.generate(model_of("bart"), sources()[1], NUM_TOKENS)
    assert tokens(outputs[1]) == zoo.generate(model_of("bart"), sources()[2], NUM_TOKENS, prompt=begun)
    assert recorder.replayed


def test_a_model_that_makes_constants_in_its_steps_is_not_trusted_to_a_replay(
    recorder: TwinRecorder, tmp_path: Path
) -> None:
    engine = captured(graphed("t5gemma", tmp_path))
    outputs = drive(engine, [sequence(0, text(sources()[1]))])
    assert tokens(outputs[0]) == zoo.generate(model_of("t5gemma"), sources()[1], NUM_TOKENS)
    assert recorder.sizes == [4, 2, 1] and engine.stats().graph_batch_sizes == ()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_graphs_are_captured_again_around_compiled_code(
    name: str, recorder: TwinRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compile_here(monkeypatch)
    engine = captured(graphed(name, tmp_path, sizes=(1, 4), has_code=True))
    assert recorder.sizes == [4, 1, 1, 4]
    stats = engine.stats()
    assert (stats.compiled_batch_sizes, stats.graph_batch_sizes) == ((1, 4), (1, 4))
    calls.clear()
    recorder.replayed.clear()
    outputs = drive(engine, [sequence(n, text(ids)) for n, ids in enumerate(sources()[:6])], stagger=1)
    assert [tokens(outputs[n]) for n in range(6)] == [
        zoo.generate(model_of(name), ids, NUM_TOKENS) for ids in sources()[:6]
    ]
    assert set(calls) == {1, 4} and set(recorder.replayed) == {1, 4}


@pytest.mark.parametrize(
    ("window", "extra"),  # attention refuses a bias with a window
    [(None, None), (3, None), (None, "bias"), (None, "sinks"), (3, "sinks"), (None, "softcap"), (3, "softcap")],
)
def test_rows_that_only_the_device_knows_attend_as_a_group_of_slots_does(window: int | None, extra: str | None) -> None:
    heads, kv_heads, dim, lengths, slots = 6, 2, 8, (5, 1, 9), (3, 0, 2)
    bias = torch.randn(heads, 4) if extra == "bias" else None
    call = AttentionCall(
        0.3, window, 1.5 if extra == "softcap" else None, torch.randn(heads) if extra == "sinks" else None, bias
    )
    shapes = (LayerShape(kv_heads, dim, dim, torch.float32),)
    groups, rows = (SlotStorage(shapes, torch.device("cpu"), ResizeArena(16, (), 5)) for _ in range(2))
    for storage in (groups, rows):
        generator = torch.Generator().manual_seed(0)
        for tensor in (storage.arenas[16].keys[0], storage.arenas[16].values[0]):
            tensor.normal_(generator=generator)
    query, key, value = (torch.randn(1, n, 3, dim) for n in (heads, kv_heads, kv_heads))
    members = [Sequence(n, [7] * length, SamplingParams(1), 0.0) for n, length in enumerate(lengths)]
    batch = Batch(tuple(ScheduledSequence(member, member.num_tokens - 1, 1, 1) for member in members))
    inputs = build_inputs(batch, lambda s: Slot(16, slots[s.sequence_id]), groups, torch.device("cpu"))
    order = [item.sequence.sequence_id for item in inputs.items]
    captured_rows = SlotRows(rows.arenas[16], torch.tensor(slots)[order], torch.tensor(lengths)[order])
    expected = attend_flat(inputs, 0, query, key, value, call)
    found = attend_flat(replace(inputs, groups=(), captured=captured_rows), 0, query, key, value, call)
    torch.testing.assert_close(found, expected)
    assert torch.equal(rows.arenas[16].keys[0], groups.arenas[16].keys[0])
    assert torch.equal(rows.arenas[16].values[0], groups.arenas[16].values[0])


def test_a_trial_gives_back_what_it_borrowed_and_rows_of_nobody_write_to_the_spare_slot(
    recorder: TwinRecorder, tmp_path: Path
) -> None:
    engine = captured(graphed("t5", tmp_path))
    graphs, runner = engine.compiled, engine.runner
    assert isinstance(graphs, GraphedSteps) and isinstance(runner, Seq2SeqRunner)
    scene = graphs._scene
    assert isinstance(scene, SlotScene)
    (own,), (cross,) = runner.storage.arenas.values(), runner.cross_storage.arenas.values()
    with torch.inference_mode():
        tensors = (*own.keys, *own.values, *cross.keys, *cross.values)
        for tensor in tensors:
            tensor.normal_()
        before = [tensor.clone() for tensor in tensors]
        with scene.trial(3) as layout:
            for tensor, old in zip(tensors, before, strict=True):
                assert not torch.equal(tensor[:3, :, :CAPACITY], old[:3, :, :CAPACITY])
            assert graphs.run(layout) is not None
            assert not torch.equal(own.keys[0][4, :, 0], before[0][4, :, 0])
        for tensor, old in zip(tensors, before, strict=True):
            assert torch.equal(tensor[:4], old[:4])
        assert torch.equal(own.keys[0][4, :, 1:], before[0][4, :, 1:])


def test_a_graph_that_writes_nothing_is_found_out(
    recorder: TwinRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.model.slot_rows.SlotRows.write", lambda *_: None)
    assert captured(graphed("bart", tmp_path)).stats().graph_batch_sizes == ()
    assert "the graph of 4 sequences around the eager step does not serve" in caplog.text


def test_tokens_that_only_the_device_knows_take_the_place_of_the_hosts() -> None:
    shapes = (LayerShape(2, 4, 4, torch.float32),)
    own, cross = (SlotStorage(shapes, torch.device("cpu"), ResizeArena(c, (), 4)) for c in (16, 32))
    decoder = type("Decoder", (), {"marker": torch.zeros(1), "biases": {}})()
    scene = SlotScene(own, cross, decoder, 99, torch.device("cpu"))
    inputs = scene.inputs(4)
    members = [Sequence(n, [50 + n] * (5 + n), SamplingParams(1), 0.0, source=text([7] * (9 + n))) for n in range(2)]
    batch = Batch(tuple(ScheduledSequence(member, member.num_tokens - 1, 1, n) for n, member in enumerate(members)))
    layout = lay_out_rows(batch, lambda s: Slot(16, 2 - s.sequence_id), lambda _: Slot(32, 1))
    assert layout is not None and layout.logit_rows.tolist() == [1]
    inputs.fill(layout, None)
    step = inputs.step()
    rows, read = step.inputs.captured, step.cross.captured  # type: ignore[union-attr]
    assert step.inputs.input_ids.tolist() == [[50, 51, 0, 0]]
    assert step.inputs.position_ids.tolist() == [[4, 5, 0, 0]]
    assert (rows.slots.tolist(), rows.lengths.tolist()) == ([2, 1, 3, 3], [5, 6, 1, 1])  # type: ignore[union-attr]
    assert (read.slots.tolist(), read.lengths.tolist()) == ([1, 1, 3, 3], [9, 10, 1, 1])  # type: ignore[union-attr]
    inputs.fill(layout, torch.tensor([[8, 9]]))
    assert step.inputs.input_ids.tolist() == [[8, 9, 0, 0]]
