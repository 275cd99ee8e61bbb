"""Every lane gives the tokens of generate(), whatever shares the batch."""

from __future__ import annotations

import pytest

from engine.errors import ContextLengthExceeded
from engine.kv.manager import KVManager
from engine.kv.pool import SlotPool, size_classes
from engine.model.runner import FlatRunner
from tests import zoo
from tests.engine.harness import drive, engine_for, greedy, reference, tokens

LENGTHS = (5, 40, 90, 3, 70, 1, 64, 33)
NUM_TOKENS = 20


def _prompts() -> list[list[int]]:
    return [zoo.prompt(length, seed=number) for number, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("name", sorted(zoo.FLAT_FAMILIES))
def test_a_flat_family_gives_the_tokens_of_generate_alone_and_in_company(name: str) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in _prompts()]
    assert zoo.is_diverse(expected) or name == "gpt2"
    engine = engine_for(name)
    assert engine.lane.name == "flat", engine.lane.reason
    together = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(_prompts())])
    assert [tokens(together[n]) for n in range(8)] == expected
    # Once more: now every prompt finds its prefix computed.
    again = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(_prompts())])
    assert [tokens(again[n]) for n in range(8)] == expected
    assert engine.stats().prefix_cache_hits_total > 0
    alone = drive(engine_for(name), [greedy(0, _prompts()[1], NUM_TOKENS)])
    assert tokens(alone[0]) == expected[1]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2"])
def test_chunked_prefill_changes_nothing(name: str) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in _prompts()]
    engine = engine_for(name, max_batch_tokens=12)
    outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(_prompts())])
    assert [tokens(outputs[n]) for n in range(8)] == expected


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "bloom"])
def test_steps_that_overlap_give_the_same_tokens(name: str) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in _prompts()]
    engine = engine_for(name, is_overlapped=True, max_batch_tokens=64)
    assert engine.pipeline.is_on == (engine.lane.name == "flat")
    for _ in range(2):  # the second time with every prefix computed
        outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(_prompts())], stagger=5)
        assert [tokens(outputs[n]) for n in range(8)] == expected


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_preemption_changes_nothing(name: str) -> None:
    prompts = [zoo.prompt(12, seed=n) for n in range(6)]
    expected = [reference(name, prompt, 140) for prompt in prompts]
    engine = engine_for(name)
    assert isinstance(engine.kv, KVManager)
    # Room for two whole sequences of six, in slots that must grow on the way.
    engine.kv.pool = SlotPool(size_classes(16, 160), max_slots=16, budget_tokens=330)
    outputs = drive(engine, [greedy(n, prompt, 140) for n, prompt in enumerate(prompts)])
    assert [tokens(outputs[n]) for n in range(6)] == expected
    assert engine.stats().preemptions_total > 0


@pytest.mark.parametrize("name", sorted(zoo.SOLO_FAMILIES))
def test_a_solo_family_gives_the_tokens_of_generate_in_company(name: str) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in _prompts()]
    assert zoo.is_diverse(expected)
    engine = engine_for(name)
    assert engine.lane.name == "solo"
    outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(_prompts())])
    assert [tokens(outputs[n]) for n in range(8)] == expected


@pytest.mark.parametrize("name", ["bloom", "gptj", "falcon", "llama"])
def test_a_padding_token_in_a_prompt_is_a_token_like_any_other(name: str) -> None:
    pad_id = zoo.SPECIAL_TOKEN_IDS["pad_token_id"] or 0
    prompts = [[pad_id, 5, 6, 7], [5, pad_id, 6, 7], [5, 6, 7, pad_id]]
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in prompts]
    outputs = drive(engine_for(name), [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts)])
    assert [tokens(outputs[n]) for n in range(3)] == expected


@pytest.mark.parametrize("name", ["bloom", "jamba", "phi3_longrope", "llama_dynamic", "recurrent_gemma"])
def test_preempted_solo_sequences_continue_as_if_undisturbed(name: str) -> None:
    prompts = [zoo.prompt(length, seed=length) for length in (12, 20, 16, 9)]
    expected = [reference(name, prompt, 40) for prompt in prompts]
    lane = engine_for(name).lane
    budget = 2 * lane.kv_bytes_fixed + 75 * lane.kv_bytes_per_token
    engine = engine_for(name, kv_budget_bytes=budget)
    outputs = drive(engine, [greedy(n, prompt, 40) for n, prompt in enumerate(prompts)], stagger=1)
    assert [tokens(outputs[n]) for n in range(4)] == expected
    assert engine.stats().preemptions_total > 0


def test_sequences_that_leave_early_disturb_nobody() -> None:
    prompts = _prompts()
    expected = [reference("qwen3", prompt, NUM_TOKENS) for prompt in prompts]
    engine = engine_for("qwen3")
    sequences = [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts)]
    got: dict[int, list[int]] = {n: [] for n in range(8)}
    for sequence in sequences:
        engine.add(sequence)
    for step in range(200):
        for output in engine.step():
            got[output.sequence_id].extend(output.token_ids)
        if step in (1, 4, 9):
            engine.abort({1: 6, 4: 0, 9: 2}[step])
        engine.kv.check_integrity()
    assert not engine.has_work()
    for number in (1, 3, 4, 5, 7):
        assert got[number] == expected[number]


def test_eight_choices_of_one_prompt_compute_it_once() -> None:
    prompt = zoo.prompt(200)
    expected = reference("llama", prompt, 10)
    engine = engine_for("llama", max_batch_tokens=64)
    outputs = drive(engine, [greedy(n, prompt, 10) for n in range(8)], stagger=1)
    assert [tokens(outputs[n]) for n in range(8)] == [expected] * 8
    # 200 once, then what lies past the last full block for the other seven, and the outputs.
    assert engine.stats().step_tokens_total <= 200 + 7 * (200 - 192 + 32 * 4) + 8 * 9


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_static_cache_gives_the_same_tokens_and_never_allocates(name: str) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in _prompts()]
    engine = engine_for(name, is_static_cache=True, max_num_seqs=4, max_model_len=128)
    assert isinstance(engine.runner, FlatRunner)
    storage = engine.runner.storage
    tensors = [id(tensor) for arena in storage.arenas.values() for tensor in (*arena.keys, *arena.values)]
    assert storage.num_bytes == 4 * 128 * engine.lane.kv_bytes_per_token == engine.stats().kv_bytes_allocated
    for _ in range(2):
        outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(_prompts())])
        assert [tokens(outputs[n]) for n in range(8)] == expected
        engine.on_idle()
    assert [id(tensor) for arena in storage.arenas.values() for tensor in (*arena.keys, *arena.values)] == tensors
    with pytest.raises(ContextLengthExceeded, match=r"130 tokens.*128"):
        engine.add(greedy(9, zoo.prompt(130), 5))


def test_a_static_cache_is_refused_with_the_arithmetic_or_the_reason() -> None:
    with pytest.raises(ValueError, match=r"512 bytes a token x 128 positions .* x 4 slots = 262144 bytes; 1000 bytes"):
        engine_for("llama", is_static_cache=True, max_num_seqs=4, max_model_len=128, kv_budget_bytes=1000)
    with pytest.raises(ValueError, match="--static-cache True: this model keeps a cache of its own"):
        engine_for("mamba", is_static_cache=True)
