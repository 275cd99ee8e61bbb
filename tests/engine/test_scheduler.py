"""Who computes what in a step: order, budgets, chunks, preemption, deadlines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.batch import Batch, Chosen
from engine.config import EngineConfig
from engine.errors import ContextLengthExceeded, QueueTimeout
from engine.kv.manager import KVManager
from engine.kv.pool import SlotPool, size_classes
from engine.pacing import MAX_SLOWDOWN, MIN_PROMPT_TOKENS, Pacing
from engine.scheduler import AGEING_S, Scheduler
from engine.sequence import PromptProbe, SamplingParams, Sequence, SequenceState


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _scheduler(budget_tokens: int | None = None, **limits: int) -> Scheduler:
    config = replace(EngineConfig(4, 64, 256, eos_token_ids=frozenset({2})), **limits)  # type: ignore[arg-type]
    pool = SlotPool(size_classes(16, 256), 8, budget_tokens)
    return Scheduler(config, KVManager(pool, is_prefix_caching=False), Pacing(), _Clock())


def _sequence(number: int, length: int, max_tokens: int = 8, **fields: object) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Sequence(number, [5] * length, params, **{"arrival_time_s": 100.0 + number, **fields})  # type: ignore[arg-type]


def _commit(scheduler: Scheduler, batch: Batch, token_id: int = 7) -> list[int]:
    chosen = {item.sequence.sequence_id: Chosen(token_id, None) for item in batch.items if item.is_sampling}
    return [output.sequence_id for output in scheduler.commit(batch, chosen)]


def _shape(batch: Batch) -> list[tuple[int, int, int]]:
    return [(item.sequence.sequence_id, item.start, item.num_tokens) for item in batch.items]


def test_a_step_computes_at_most_its_budget_and_cuts_prompts() -> None:
    scheduler = _scheduler(max_batch_tokens=50)
    scheduler.add(_sequence(0, 40))
    scheduler.add(_sequence(1, 40))
    first = scheduler.schedule()
    assert _shape(first) == [(0, 0, 40), (1, 0, 10)]
    assert [item.is_sampling for item in first.items] == [True, False]
    assert _commit(scheduler, first) == [0]
    second = scheduler.schedule()
    # One stream's token and, before anything was measured, the least of the prompt.
    assert _shape(second) == [(0, 40, 1), (1, 10, MIN_PROMPT_TOKENS)]


def test_arrivals_beyond_the_batch_size_wait_in_order() -> None:
    scheduler = _scheduler(max_num_seqs=2)
    for number in range(4):
        scheduler.add(_sequence(number, 4, max_tokens=1))
    assert _commit(scheduler, scheduler.schedule()) == [0, 1]
    assert _commit(scheduler, scheduler.schedule()) == [2, 3]
    assert not scheduler.running and not scheduler.waiting


def test_priority_goes_first_until_waiting_outweighs_it() -> None:
    scheduler = _scheduler(max_num_seqs=1)
    scheduler.add(_sequence(0, 4, priority=1))
    scheduler.add(_sequence(1, 4, priority=0))
    clock = scheduler.clock
    assert isinstance(clock, _Clock)
    clock.now = 101.0
    assert [item.sequence.sequence_id for item in scheduler.schedule().items] == [1]
    scheduler.abort(1)
    scheduler.add(_sequence(2, 4, priority=0, arrival_time_s=100.0 + 2 * AGEING_S))
    clock.now = 100.0 + 2 * AGEING_S
    assert [item.sequence.sequence_id for item in scheduler.schedule().items] == [0]


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    scheduler = _scheduler(max_model_len=100)
    with pytest.raises(ContextLengthExceeded, match=r"120 tokens.*100"):
        scheduler.add(_sequence(0, 120))
    small = _scheduler(budget_tokens=64)
    with pytest.raises(ContextLengthExceeded, match=r"60 tokens.*max_tokens 20.*80 tokens"):
        small.add(_sequence(0, 60, max_tokens=20))
    assert not scheduler.waiting and not small.waiting


def test_the_youngest_is_preempted_and_recomputes() -> None:
    scheduler = _scheduler(max_num_seqs=4)
    old, young = _sequence(0, 14, max_tokens=40), _sequence(1, 14, max_tokens=40)
    # Reserved room would avoid what this test wants to see.
    scheduler.kv = KVManager(SlotPool((16, 32, 64), 8, 96), is_prefix_caching=False)
    for sequence in (old, young):
        sequence.state = SequenceState.RUNNING
        sequence.params = SamplingParams(max_tokens=1)
        assert scheduler.kv.admit(sequence)
        sequence.params = SamplingParams(max_tokens=40, temperature=0.0)
        scheduler.running.append(sequence)
    preempted: list[Sequence] = []
    for _ in range(80):
        batch = scheduler.schedule()
        preempted.extend(batch.preempted)
        _commit(scheduler, batch)
    assert preempted and set(map(id, preempted)) == {id(young)}
    assert len(old.output_token_ids) == len(young.output_token_ids) == 40
    scheduler.kv.check_integrity()


def test_a_sequence_ends_at_eos_at_its_limit_and_at_the_context() -> None:
    scheduler = _scheduler(max_model_len=16)
    scheduler.add(_sequence(0, 4, max_tokens=50))
    scheduler.add(_sequence(1, 4, max_tokens=2))
    scheduler.add(_sequence(2, 4, max_tokens=50))
    reasons = {}
    for _ in range(20):
        batch = scheduler.schedule()
        chosen = {i.sequence.sequence_id: Chosen(2 if i.sequence.sequence_id == 2 else 7, None) for i in batch.items}
        for output in scheduler.commit(batch, chosen):
            if output.is_last:
                reasons[output.sequence_id] = (output.finish_reason, output.stop_token_id)
    assert reasons == {0: ("length", None), 1: ("length", None), 2: ("stop", 2)}


def test_whoever_waits_past_the_deadline_is_answered() -> None:
    scheduler = _scheduler(max_num_seqs=1)
    scheduler.add(_sequence(0, 4))
    _commit(scheduler, scheduler.schedule())
    scheduler.add(_sequence(1, 4, deadline_s=105.0))
    assert scheduler.expire() == []
    clock = scheduler.clock
    assert isinstance(clock, _Clock)
    clock.now = 106.0
    (late,) = scheduler.expire()
    assert late.sequence_id == 1 and isinstance(late.error, QueueTimeout)
    assert not scheduler.waiting


def test_prompt_logits_are_wanted_for_every_token_only_when_the_prompt_is_scored() -> None:
    scheduler = _scheduler()
    plain, scored = _sequence(0, 6), _sequence(1, 6)
    scored.params = SamplingParams(max_tokens=1, num_prompt_logprobs=0)
    scheduler.add(plain)
    scheduler.add(scored)
    assert [item.num_logits for item in scheduler.schedule().items] == [1, 6]


@pytest.mark.parametrize(("position", "expected"), [(0, [5, 0, 1]), (4, [1, 0, 1]), (5, [0, 5, 1]), (11, [0, 0, 1])])
def test_logits_are_wanted_from_a_probed_token_to_the_end_of_its_chunk(position: int, expected: list[int]) -> None:
    scheduler = _scheduler(max_batch_tokens=5)
    probing = _sequence(0, 12)
    probing.params = SamplingParams(max_tokens=2, probe=PromptProbe(position, (1,)))
    scheduler.add(probing)
    wanted = []
    for _ in range(4):
        batch = scheduler.schedule()
        wanted += [item.num_logits for item in batch.items]
        _commit(scheduler, batch)
    assert wanted == [*expected, 1]  # and once for the second token


def test_what_was_read_of_a_prompt_is_told_once_and_lost_with_a_preemption() -> None:
    scheduler = _scheduler(max_batch_tokens=5)
    probing = _sequence(0, 8)
    probing.params = SamplingParams(max_tokens=3, probe=PromptProbe(2, (1,)))
    scheduler.add(probing)
    _commit(scheduler, scheduler.schedule())
    probing.probed = (0.5,)
    scheduler._preempt(probing)
    assert probing.probed is None
    _commit(scheduler, scheduler.schedule())
    probing.probed = (0.25,)
    told = []
    for _ in range(3):
        batch = scheduler.schedule()
        told += [output.probed for output in scheduler.commit(batch, {0: Chosen(7, None)})]
    assert told == [(0.25,), None, None]


def test_pacing_lets_prompts_slow_streams_by_a_bounded_factor() -> None:
    pacing = Pacing()
    assert pacing.prompt_tokens(500, num_streams=0, num_prompts=1) == 500
    assert pacing.prompt_tokens(500, num_streams=3, num_prompts=1) == MIN_PROMPT_TOKENS
    for _ in range(50):
        pacing.observe(num_streams=8, num_prompt_tokens=0, duration_s=0.050)
        pacing.observe(num_streams=8, num_prompt_tokens=100, duration_s=0.150)
    one_prompt = pacing.prompt_tokens(500, num_streams=8, num_prompts=1)
    assert 50 * (MAX_SLOWDOWN - 1) * 0.9 <= one_prompt <= 50 * (MAX_SLOWDOWN - 1) * 1.1  # at 1 ms a token
    # In a burst most people wait for a first token, and the few that stream give way, up to a quarter of a second.
    two = pacing.prompt_tokens(500, num_streams=8, num_prompts=2)
    assert two == pytest.approx(2 * one_prompt, abs=3)
    assert pacing.prompt_tokens(5000, num_streams=1, num_prompts=90) == pytest.approx(200, abs=20)
