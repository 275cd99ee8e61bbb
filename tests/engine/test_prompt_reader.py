"""What is asked about a prompt is told once, with the first output, however the prompt was computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.errors import InvalidValue, NonFiniteLogits, UnsupportedParameter
from engine.kv.prefix import BLOCK_SIZE
from engine.sequence import PromptProbe, SamplingParams, Sequence, SequenceOutput, Source, TokenRules
from tests import zoo
from tests.engine.harness import drive, engine_for, tiny_model, tokens
from tests.engine.scripted_runner import NUM_HEADS, logits_at, scripted_engine, weights_at

IDS = (3, 100, 7)
SPEECH = Source(b"speech", 5)


def _probing(number: int, prompt: list[int], position: int, max_tokens: int = 4, **params: Any) -> Sequence:
    fields = {"temperature": 0.0, "probe": PromptProbe(position, IDS), **params}
    return Sequence(number, prompt, SamplingParams(max_tokens, **fields), arrival_time_s=float(number))


def _aligning(number: int, prompt: list[int], **fields: Any) -> Sequence:
    params = SamplingParams(0, is_aligning=True)
    return Sequence(number, prompt, params, arrival_time_s=float(number), source=SPEECH, **fields)


def _plain(number: int, prompt: list[int], **fields: Any) -> Sequence:
    return Sequence(number, prompt, SamplingParams(4, temperature=0.0), arrival_time_s=float(number), **fields)


def _expected(sequence: Sequence) -> tuple[float, ...]:
    assert sequence.params.probe is not None
    probabilities = logits_at(sequence, sequence.params.probe.position).softmax(-1)
    return tuple(probabilities[list(IDS)].tolist())


def _told(outputs: list[SequenceOutput]) -> tuple[float, ...]:
    """What the first output tells; the others must tell nothing."""
    assert all(output.probed is None for output in outputs[1:])
    assert outputs[0].probed is not None
    return outputs[0].probed


def _preempt(engine: Engine, sequence: Sequence) -> None:
    engine.scheduler._preempt(sequence)
    engine.runner.forget(sequence)


@pytest.mark.parametrize("budget", [256, 30, 9, 2, 1])
@pytest.mark.parametrize("position", [0, 8, 9, 17, 28, 29])
def test_a_probe_is_told_wherever_the_prompt_is_cut_and_changes_no_token(budget: int, position: int) -> None:
    engine, _ = scripted_engine(max_batch_tokens=budget)
    prompts = [zoo.prompt(30, seed=n) for n in range(3)]
    expected = drive(engine, [_plain(n, prompt) for n, prompt in enumerate(prompts)], stagger=1)
    engine, _ = scripted_engine(max_batch_tokens=budget)
    rows = [_plain(0, prompts[0]), _probing(1, prompts[1], position), _probing(2, prompts[2], position)]
    outputs = drive(engine, rows, stagger=1)
    for number in range(3):
        assert tokens(outputs[number]) == tokens(expected[number])
    assert _told(outputs[1]) == pytest.approx(_expected(rows[1]))
    assert _told(outputs[2]) == pytest.approx(_expected(rows[2]))
    assert all(output.probed is None for output in outputs[0])


@pytest.mark.parametrize("name", ["qwen2", "bloom", "mamba"])
@pytest.mark.parametrize("budget", [256, 12])
def test_both_lanes_tell_the_models_own_probabilities(name: str, budget: int) -> None:
    engine = engine_for(name, max_batch_tokens=budget)
    assert engine.lane.name == ("flat" if name == "qwen2" else "solo")
    prompts = [zoo.prompt(20, seed=n) for n in range(3)]
    rules = TokenRules(suppressed=IDS)  # what may not be chosen is as likely as ever to a probe
    rows = [_probing(n, prompt, 5 * n, token_rules=rules) for n, prompt in enumerate(prompts)]
    outputs = drive(engine, rows, stagger=1)
    model = tiny_model(name)
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0]
        told = logits[5 * number].float().softmax(-1)[list(IDS)]
        assert _told(outputs[number]) == pytest.approx(told.tolist(), abs=1e-5)
        logits[-1, list(IDS)] = -torch.inf
        assert tokens(outputs[number])[0] == int(logits[-1].argmax())


def test_only_the_step_that_computes_the_position_is_asked_for_it() -> None:
    engine, runner = scripted_engine(max_batch_tokens=10)
    drive(engine, [_probing(0, zoo.prompt(30), 12, max_tokens=2)])
    assert runner.asked == [(0, 0, 10, 0), (0, 10, 10, 8), (0, 20, 10, 1), (0, 30, 1, 1)]


def test_a_prompt_is_scored_and_probed_at_once() -> None:
    engine, _ = scripted_engine(max_batch_tokens=7)
    prompt = zoo.prompt(20)
    both = _probing(0, prompt, 9, num_prompt_logprobs=1)
    outputs = drive(engine, [both])[0]
    assert _told(outputs) == pytest.approx(_expected(both))
    scored = outputs[0].prompt_logprobs
    assert scored is not None and len(scored) == 20
    for position, entry in enumerate(scored[1:]):
        assert entry is not None
        logprob = logits_at(both, position).log_softmax(-1)[prompt[position + 1]].item()
        assert entry.logprob == pytest.approx(logprob, abs=1e-5)


def test_a_prompt_can_be_probed_without_generating() -> None:
    engine, _ = scripted_engine(max_batch_tokens=7)
    probing = _probing(0, zoo.prompt(20), 4, max_tokens=0)
    (only,) = drive(engine, [probing])[0]
    assert only.token_ids == () and only.finish_reason == "length"
    assert only.probed == pytest.approx(_expected(probing))


def test_a_probed_token_is_computed_even_where_its_prefix_is_known() -> None:
    engine, runner = scripted_engine()
    prompt = zoo.prompt(4 * BLOCK_SIZE)
    drive(engine, [_plain(0, prompt)])
    runner.asked.clear()
    position = 2 * BLOCK_SIZE + 5
    probing = _probing(1, prompt, position)
    outputs = drive(engine, [probing])[1]
    assert outputs[0].num_cached_tokens == 2 * BLOCK_SIZE
    assert runner.asked[0] == (1, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE, 4 * BLOCK_SIZE - position)
    assert _told(outputs) == pytest.approx(_expected(probing))
    at_border = _probing(2, prompt, BLOCK_SIZE)
    assert _told(drive(engine, [at_border])[2]) == pytest.approx(_expected(at_border))
    assert at_border.num_cached_tokens == BLOCK_SIZE


def test_a_prompt_preempted_half_way_is_probed_afresh() -> None:
    engine, runner = scripted_engine(max_batch_tokens=2 * BLOCK_SIZE)
    probing = _probing(0, zoo.prompt(5 * BLOCK_SIZE), BLOCK_SIZE + 3)
    engine.add(probing)
    assert engine.step() == []
    first = probing.probed
    assert first == pytest.approx(_expected(probing))
    _preempt(engine, probing)
    assert probing.probed is None
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert _told(outputs) == pytest.approx(_expected(probing))
    assert sum(1 for _, start, num, logits in runner.asked if logits and start + num < 5 * BLOCK_SIZE) == 2


def test_a_sequence_preempted_after_its_first_output_is_not_probed_again() -> None:
    engine, runner = scripted_engine()
    probing = _probing(0, zoo.prompt(20), 3)
    engine.add(probing)
    outputs = [*engine.step(), *engine.step()]
    _preempt(engine, probing)
    runner.asked.clear()
    while engine.has_work():
        outputs += engine.step()
    assert _told(outputs) == pytest.approx(_expected(probing))
    assert [logits for *_, logits in runner.asked] == [1, 1]


@pytest.mark.parametrize("budget", [256, 12])
def test_a_probed_row_of_nan_fails_alone(budget: int) -> None:
    engine, runner = scripted_engine(max_batch_tokens=budget)
    prompts = [zoo.prompt(20, seed=n) for n in range(4)]
    runner.nan_at = {(1, 5), (2, 5)}
    scored = SamplingParams(4, temperature=0.0, num_prompt_logprobs=0)
    rows = [_probing(0, prompts[0], 5), _probing(1, prompts[1], 5), Sequence(2, prompts[2], scored, 2.0)]
    outputs = drive(engine, [*rows, _plain(3, prompts[3])], stagger=1)
    assert _told(outputs[0]) == pytest.approx(_expected(rows[0]))
    assert len(tokens(outputs[0])) == len(tokens(outputs[3])) == 4
    for number in (1, 2):
        (only,) = outputs[number]
        assert isinstance(only.error, NonFiniteLogits) and "prompt token" in only.error.message


@pytest.mark.parametrize("budget", [256, 9, 1])
def test_a_prompt_is_aligned_whole_however_it_is_cut(budget: int) -> None:
    engine, _ = scripted_engine(max_batch_tokens=budget, max_source_len=8)
    prompts = [zoo.prompt(20 + n, seed=n) for n in range(3)]
    rows = [_aligning(0, prompts[0]), _plain(1, prompts[1], source=SPEECH), _aligning(2, prompts[2])]
    outputs = drive(engine, rows, stagger=1)
    for number in (0, 2):
        (only,) = outputs[number]
        assert only.token_ids == () and only.finish_reason == "length" and only.error is None
        assert only.alignment is not None and only.alignment.dtype == np.float32
        assert only.alignment.shape == (NUM_HEADS, 20 + number, 5)
        for position in range(20 + number):
            assert np.array_equal(only.alignment[:, position], weights_at(position, 5))
    assert all(output.alignment is None for output in outputs[1])
    assert len(tokens(outputs[1])) == 4


def test_an_aligning_prompt_reuses_nothing_and_starts_over_after_preemption() -> None:
    engine, runner = scripted_engine(max_batch_tokens=2 * BLOCK_SIZE, max_source_len=8)
    prompt = zoo.prompt(4 * BLOCK_SIZE)
    drive(engine, [_plain(0, prompt, source=SPEECH)])
    runner.asked.clear()
    aligning = _aligning(1, prompt)
    engine.add(aligning)
    assert engine.step() == []
    assert len(aligning.alignment) == 1
    _preempt(engine, aligning)
    assert not aligning.alignment
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    (only,) = outputs
    assert only.alignment is not None and only.alignment.shape[1] == 4 * BLOCK_SIZE
    assert np.array_equal(only.alignment[:, -1], weights_at(4 * BLOCK_SIZE - 1, 5))
    assert [start for _, start, _, _ in runner.asked] == [0, 0, 2 * BLOCK_SIZE]


def test_a_model_that_tells_no_alignment_fails_who_asks_alone() -> None:
    engine, runner = scripted_engine(max_source_len=8)
    runner.is_aligning = False
    outputs = drive(engine, [_aligning(0, zoo.prompt(10)), _plain(1, zoo.prompt(10), source=SPEECH)], stagger=1)
    assert isinstance(outputs[0][-1].error, UnsupportedParameter)
    assert len(tokens(outputs[1])) == 4


def test_what_points_outside_prompt_or_vocabulary_is_refused_before_it_is_queued() -> None:
    engine, _ = scripted_engine()
    running = _plain(0, zoo.prompt(10))
    engine.add(running)
    for number, params in enumerate(
        (
            SamplingParams(4, probe=PromptProbe(10, (1,))),
            SamplingParams(4, probe=PromptProbe(0, (256,))),
            SamplingParams(4, token_rules=TokenRules(suppressed=(256,))),
        ),
        start=1,
    ):
        with pytest.raises(InvalidValue):
            engine.add(Sequence(number, zoo.prompt(10), params, 0.0))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert len(tokens(outputs)) == 4
