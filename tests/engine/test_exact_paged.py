"""KV in pages gives the tokens of generate(), as slots do in test_exact.py, whatever shares the batch.

On the CPU by the kernel's plain twin, so that all but the kernel itself is what a GPU runs; tests/gpu has the kernel.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from engine.build_paged import build_paged
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ContextLengthExceeded, StepFailed
from engine.kv.paged_manager import PagedManager
from engine.kv.paged_pool import BlockPool
from engine.kv.prefix import BLOCK_SIZE
from engine.model.attention import AttentionCall
from engine.model.loader import describe
from engine.model.paged_attention import KernelAttention, attend_blocks
from engine.model.paged_inputs import PagedInputs
from engine.model.paged_runner import PagedRunner
from engine.model.paged_step import OwnTokens
from engine.model.runner import FlatRunner
from engine.model.selfcheck import choose_lane
from engine.sampling.sampler import Sampler
from engine.sequence import SamplingParams
from tests import zoo
from tests.engine.harness import drive, engine_for, greedy, reference, tiny_model, tokens

FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"]
LENGTHS = (5, 40, 90, 3, 70, 1, 64, 33)
NUM_TOKENS = 20

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="no triton, or a GPU to run on instead (tests/gpu)",
)


def _prompts() -> list[list[int]]:
    return [zoo.prompt(length, seed=number) for number, length in enumerate(LENGTHS)]


def _build(name: str, attention: Any = attend_blocks, **limits: Any) -> Engine | None:
    config = EngineConfig(**{"max_num_seqs": 8, "max_batch_tokens": 256, "max_model_len": 256, **limits})
    loaded = describe(tiny_model(name))
    sampler = Sampler(loaded.vocab_size, loaded.eos_token_ids, loaded.device, is_deferring=config.is_overlapped)
    with torch.inference_mode():
        choice = choose_lane(loaded.model, loaded.device)
        assert choice.lane == "flat"
        return build_paged(loaded, config, choice, sampler, attention)


def _paged(name: str, **limits: Any) -> Engine:
    engine = _build(name, **limits)
    assert engine is not None
    return engine


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("max_batch_tokens", [256, 12])
def test_tokens_are_those_of_generate_and_so_of_slots(name: str, max_batch_tokens: int) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in _prompts()]
    engine = _paged(name, max_batch_tokens=max_batch_tokens)
    assert engine.lane.kv_layout == "pages"
    for _ in range(2):  # the second time with every prefix computed
        outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(_prompts())])
        assert [tokens(outputs[n]) for n in range(8)] == expected
    assert engine.stats().prefix_cache_hits_total > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_that_overlap_give_the_same_tokens(name: str) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in _prompts()]
    engine = _paged(name, is_overlapped=True, max_batch_tokens=64)
    for _ in range(2):
        outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(_prompts())], stagger=5)
        assert [tokens(outputs[n]) for n in range(8)] == expected


@pytest.mark.parametrize("is_overlapped", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_preemption_changes_nothing(name: str, is_overlapped: bool) -> None:
    prompts = [zoo.prompt(12, seed=n) for n in range(4)]
    expected = [reference(name, prompt, 60) for prompt in prompts]
    # Room for two whole sequences of four and a bit.
    budget = 7 * BLOCK_SIZE * engine_for(name).lane.kv_bytes_per_token
    engine = _paged(name, kv_budget_bytes=budget, is_overlapped=is_overlapped)
    outputs = drive(engine, [greedy(n, prompt, 60) for n, prompt in enumerate(prompts)])
    assert [tokens(outputs[n]) for n in range(4)] == expected
    stats = engine.stats()
    assert stats.preemptions_total > 0
    assert stats.kv_bytes_allocated <= budget


@interpreted
@pytest.mark.parametrize(("name", "length"), [("mistral", 131), ("gemma2", 40), ("gpt_oss", 131), ("deepseek_v3", 40)])
def test_the_interpreted_kernel_gives_the_tokens_of_generate(name: str, length: int) -> None:
    prompts = [zoo.prompt(length, seed=length) for length in (length, 3)]  # from 128 on, keys are split
    engine = _build(name, KernelAttention(torch.device("cpu"), num_sms=132), max_batch_tokens=72)
    assert engine is not None
    outputs = drive(engine, [greedy(n, prompt, 6) for n, prompt in enumerate(prompts)])
    assert [tokens(outputs[n]) for n in range(2)] == [reference(name, prompt, 6) for prompt in prompts]


def test_pages_are_kept_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(engine_for("llama").runner, FlatRunner)
    monkeypatch.setattr("engine.build.kernel_for", lambda _device: attend_blocks)
    assert isinstance(engine_for("llama").runner, PagedRunner)
    assert isinstance(engine_for("llama", is_static_cache=True).runner, PagedRunner)


@pytest.mark.parametrize("name", FAMILIES)
def test_static_pages_give_the_same_tokens_and_never_move(name: str) -> None:
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in _prompts()]
    engine = _paged(name, is_static_cache=True, max_num_seqs=3, max_model_len=110)
    assert isinstance(engine.runner, PagedRunner)
    storage = engine.runner.storage
    addresses = [tensor.data_ptr() for tensor in (*storage.keys, *storage.values)]
    for _ in range(2):  # the second time with prefixes computed
        outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(_prompts())])
        assert [tokens(outputs[n]) for n in range(8)] == expected
        engine.on_idle()
    stats = engine.stats()
    assert stats.prefix_cache_hits_total > 0 and stats.preemptions_total == 0
    # Three slots of 110 tokens in whole pages of 32, from the start to the end.
    assert stats.kv_bytes_allocated == storage.num_bytes == 3 * 128 * engine.lane.kv_bytes_per_token
    assert [tensor.data_ptr() for tensor in (*storage.keys, *storage.values)] == addresses


def test_a_request_that_does_not_fit_a_static_slot_is_refused_with_both_numbers() -> None:
    engine = _paged("llama", is_static_cache=True, max_num_seqs=2, max_model_len=64)
    with pytest.raises(ContextLengthExceeded, match="the prompt has 64 tokens, and this model's context holds 64"):
        engine.add(greedy(0, zoo.prompt(64), 1))
    prompt = zoo.prompt(63)
    assert tokens(drive(engine, [greedy(1, prompt, 1)])[1]) == reference("llama", prompt, 1)


def test_a_static_cache_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(
        ValueError,
        match="--static-cache True: decoder: 512 bytes a token x 128 positions = 65536 bytes a slot x 4 slots = "
        "262144 bytes; 262143 bytes are free for it",
    ):
        _build("llama", is_static_cache=True, max_num_seqs=4, max_model_len=100, kv_budget_bytes=262_143)


def test_static_storage_that_fails_is_emptied_where_it_is() -> None:
    engine = _paged("llama", is_static_cache=True, max_num_seqs=2)
    assert isinstance(engine.runner, PagedRunner)
    storage, apply = engine.runner.storage, engine.runner.apply
    address = storage.keys[0].data_ptr()
    prompt = zoo.prompt(40)
    engine.add(greedy(0, prompt, 20))
    engine.step()

    def fail_once(ops: Iterable[Any]) -> None:
        engine.runner.apply = apply  # type: ignore[method-assign]
        raise RuntimeError("lost")

    engine.runner.apply = fail_once  # type: ignore[method-assign]
    (failed,) = engine.step()
    assert isinstance(failed.error, StepFailed)
    assert storage.keys[0].data_ptr() == address and not storage.keys[0].any()
    engine.kv.check_integrity()
    assert tokens(drive(engine, [greedy(2, prompt, 20)])[2]) == reference("llama", prompt, 20)


def test_a_shared_prompt_takes_its_blocks_once() -> None:
    prompt = zoo.prompt(200)
    expected = reference("llama", prompt, 10)
    engine = _paged("llama", max_batch_tokens=64)
    sequences = [greedy(n, prompt, 10) for n in range(8)]
    outputs = drive(engine, sequences, stagger=1)
    assert [tokens(outputs[n]) for n in range(8)] == [expected] * 8
    # 6 full blocks for all, and each one's own for the last 8 tokens and the output; doubled at most.
    assert engine.stats().kv_tokens_allocated <= 2 * BLOCK_SIZE * (6 + 8)
    assert engine.stats().step_tokens_total <= 200 + 7 * (200 - 192 + 32 * 4) + 8 * 9


def test_idle_memory_is_given_back_and_what_stays_is_still_right() -> None:
    engine = _paged("llama")
    assert isinstance(engine.runner, PagedRunner)
    first, other = zoo.prompt(100, seed=1), zoo.prompt(100, seed=2)
    drive(engine, [greedy(0, other, 10), greedy(1, first, 10)])
    before = engine.runner.storage.num_bytes
    engine.kv.give_back(3 * BLOCK_SIZE)
    engine.on_idle()
    assert engine.runner.storage.num_bytes == engine.stats().kv_bytes_allocated < before
    outputs = drive(engine, [greedy(2, first, 10)])
    assert tokens(outputs[2]) == reference("llama", first, 10)
    assert outputs[2][0].num_cached_tokens == 3 * BLOCK_SIZE


def test_scored_prompts_have_every_tokens_logits() -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0, num_prompt_logprobs=2)
    prompt = zoo.prompt(50)
    got = [
        drive(engine, [greedy(0, prompt, 3, params=params)])[0][0].prompt_logprobs
        for engine in (_paged("llama", max_batch_tokens=16), engine_for("llama"))
    ]
    assert got[0] is not None and got[1] is not None
    assert len(got[0]) == 50
    for ours, slots in zip(got[0][1:], got[1][1:], strict=True):
        assert ours is not None and slots is not None
        assert ours.logprob == pytest.approx(slots.logprob, abs=1e-4)


def test_an_attention_that_is_wrong_is_noticed_and_slots_serve(caplog: pytest.LogCaptureFixture) -> None:
    def forgetful(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: PagedInputs,
        call: AttentionCall,
        own: OwnTokens | None = None,
    ) -> torch.Tensor:
        return attend_blocks(query, keys, values, inputs, AttentionCall(call.scaling, 4, call.softcap, call.sinks))

    def broken(*_arguments: Any) -> torch.Tensor:
        raise OSError("no compiler")

    with caplog.at_level(logging.WARNING):
        assert _build("llama", forgetful) is None
        assert _build("llama", broken) is None
    assert "KV stays in slots, not in pages: the trial raised OSError: no compiler" in caplog.text
    assert "differ" in caplog.text


def test_a_budget_below_one_page_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ValueError, match="--kv-cache-memory 100: one page of 32 tokens of this model takes 16384 bytes"
    ):
        _build("llama", kv_budget_bytes=100)


def test_a_storage_that_fails_costs_the_running_sequences_and_no_more() -> None:
    engine = _paged("llama")
    prompt = zoo.prompt(40)
    engine.add(greedy(0, prompt, 20))
    engine.step()
    kv = engine.kv
    assert isinstance(kv, PagedManager) and isinstance(kv.pool, BlockPool)
    apply = engine.runner.apply
    engine.runner.apply = lambda ops: (_ for _ in ()).throw(RuntimeError("out of memory"))  # type: ignore[method-assign]
    engine.add(greedy(1, prompt, 20))
    failing = engine.scheduler.running[0]
    with pytest.raises(RuntimeError):
        engine.step()
    assert failing.is_finished
    engine.runner.apply = apply  # type: ignore[method-assign]
    kv.check_integrity()
    assert tokens(drive(engine, [greedy(2, prompt, 20)])[2]) == reference("llama", prompt, 20)
