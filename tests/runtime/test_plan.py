"""The arithmetic of a plan, against the accounting that the engine really uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.build import _pools
from engine.config import EngineConfig
from engine.kv.pool import SlotOp, SlotPool, size_classes
from engine.model.blueprint import Widths
from engine.model.kv_cost import KVCost
from engine.static_cache import Store
from runtime.plan import Demand, estimate_activations, make_plan

FLAT = KVCost("flat", False, "", bytes_per_token=1000)
SOLO = KVCost("solo", True, "", bytes_per_token=100, bytes_fixed=50_000)
TWO_SIDES = KVCost("seq2seq", False, "", bytes_per_token=1000, bytes_per_source_position=500)
WIDTHS = Widths(hidden=64, widest=256, num_heads=4, vocab_size=1000, itemsize=2)


def demand(**changes: Any) -> Demand:
    values: dict[str, Any] = {
        "resident_bytes": 10_000_000,
        "loading_bytes": 10_000_000,
        "scratch_bytes": 0,
        "widths": WIDTHS,
        "num_step_tokens": 512,
        "kv": FLAT,
        "kv_cache_memory": None,
        "kv_share": 0.8,
        "max_num_seqs": 4,
        "max_model_len": 4096,
        "max_source_len": None,
        "is_source_fixed": False,
        "is_static": False,
        "smallest_slot": 128,
    }
    return Demand(**{**values, **changes})


@given(
    per_token=st.integers(1, 5000),
    budget=st.integers(1, 30_000_000),
    max_model_len=st.integers(1, 9000),
    smallest=st.integers(1, 300),
)
def test_as_many_sequences_fit_as_the_slot_pool_hands_out(
    per_token: int, budget: int, max_model_len: int, smallest: int
) -> None:
    plan = make_plan(
        demand(
            kv=replace(FLAT, bytes_per_token=per_token),
            kv_cache_memory=budget,
            max_model_len=max_model_len,
            smallest_slot=smallest,
        ),
        free_bytes=10**9,
    )
    budget_tokens = budget // per_token
    # Set up as engine.py does it.
    longest = min(max_model_len, budget_tokens)
    assert plan.longest == longest
    assert plan.fits == (longest >= 1)
    if longest < 1:
        return
    for length in plan.lengths:
        pool = SlotPool(size_classes(min(smallest, longest), longest), max_slots=200, budget_tokens=budget_tokens)
        ops: list[SlotOp] = []
        num_slots = 0
        while num_slots < 200 and pool.allocate(length.num_tokens, ops) is not None:
            num_slots += 1
        assert min(length.num_fitting, 200) == num_slots
        if num_slots:
            assert length.held_bytes * num_slots == pool.num_tokens_allocated * per_token
        assert length.batch_bytes <= budget


def test_what_is_left_after_the_weights_is_shared_between_kv_and_the_rest() -> None:
    plan = make_plan(demand(), free_bytes=30_000_000)
    assert (plan.left_bytes, plan.kv_budget_bytes) == (20_000_000, 16_000_000)
    assert [length.num_tokens for length in plan.lengths] == [512, 2048, 4096]
    short, _, long = plan.lengths
    assert (short.used_bytes, short.held_bytes, short.batch_bytes) == (512_000, 512_000, 2_048_000)
    assert (short.num_fitting, long.num_fitting) == (31, 3)
    assert long.batch_bytes == 16_000_000  # four would take more than KV may
    assert short.peak_bytes == 10_000_000 + short.batch_bytes + short.activation_bytes


def test_a_sequence_between_two_sizes_holds_the_larger_one() -> None:
    (only,) = make_plan(demand(max_model_len=300), free_bytes=10**9).lengths
    assert (only.num_tokens, only.held_bytes) == (300, 300_000)  # the largest size is the longest sequence itself
    short = make_plan(demand(max_model_len=3000), free_bytes=10**9).lengths[1]
    assert (short.num_tokens, short.used_bytes, short.held_bytes) == (2048, 2_048_000, 2_048_000)
    odd = make_plan(demand(max_model_len=3000, smallest_slot=100), free_bytes=10**9).lengths[0]
    assert (odd.num_tokens, odd.used_bytes, odd.held_bytes) == (512, 512_000, 800_000)


def test_state_counts_for_every_sequence_and_sizes_do_not_for_caches_of_their_own() -> None:
    plan = make_plan(demand(kv=SOLO, kv_cache_memory=1_000_000), free_bytes=10**9)
    assert plan.longest == 4096
    assert [length.held_bytes for length in plan.lengths] == [101_200, 254_800, 459_600]
    assert [length.num_fitting for length in plan.lengths] == [9, 3, 2]
    small = make_plan(demand(kv=SOLO, kv_cache_memory=100_000), free_bytes=10**9)
    assert small.longest == 500
    assert [length.num_fitting for length in small.lengths] == [0, 0, 0]
    recurrent = make_plan(demand(kv=replace(SOLO, bytes_per_token=0), kv_cache_memory=100_000), free_bytes=10**9)
    assert recurrent.longest == 4096 and recurrent.lengths[-1].num_fitting == 2


@given(
    per_token=st.integers(1, 3000),
    per_position=st.integers(1, 3000),
    budget=st.integers(1, 30_000_000),
    max_model_len=st.integers(1, 5000),
    max_source_len=st.integers(1, 5000),
)
def test_as_many_encoder_decoder_sequences_fit_as_the_engine_s_two_pools_hand_out(
    per_token: int, per_position: int, budget: int, max_model_len: int, max_source_len: int
) -> None:
    kv = replace(TWO_SIDES, bytes_per_token=per_token, bytes_per_source_position=per_position)
    plan = make_plan(
        demand(kv=kv, kv_cache_memory=budget, max_model_len=max_model_len, max_source_len=max_source_len),
        free_bytes=10**9,
    )
    config = EngineConfig(max_num_seqs=100, max_batch_tokens=100, max_model_len=max_model_len, kv_budget_bytes=budget)
    stores = [Store("decoder", per_token, max_model_len), Store("encoder", per_position, max_source_len)]
    try:
        pools = _pools(config, stores, is_static=False)
    except ValueError:
        assert not plan.fits
        return
    assert plan.fits
    assert (plan.longest, plan.longest_source) == tuple(pool.capacities[-1] for pool in pools)
    for length in plan.lengths:
        pools = _pools(config, stores, is_static=False)
        ops: list[SlotOp] = []
        num_slots = 0
        while num_slots < 200 and all(
            pool.allocate(n, ops) is not None
            for pool, n in zip(pools, (length.num_tokens, length.num_source_positions), strict=True)
        ):
            num_slots += 1
        assert min(length.num_fitting, 200) == num_slots


def test_a_source_counts_beside_the_output() -> None:
    speech = demand(kv=TWO_SIDES, max_model_len=400, max_source_len=1500, is_source_fixed=True)
    (only,) = make_plan(speech, free_bytes=10**9).lengths
    assert (only.num_source_positions, only.used_bytes) == (1500, 400_000 + 750_000)
    text = make_plan(demand(kv=TWO_SIDES, max_model_len=4096, max_source_len=1000), free_bytes=10**9)
    assert [length.num_source_positions for length in text.lengths] == [512, 1000, 1000]
    # Windows of speech are all of one length: less room than for one of them is room for none.
    assert not make_plan(replace(speech, kv_cache_memory=1_100_000), free_bytes=10**9).fits
    assert make_plan(replace(speech, kv_cache_memory=1_150_000), free_bytes=10**9).fits
    short = make_plan(demand(kv=TWO_SIDES, max_source_len=4096, kv_cache_memory=614_400), free_bytes=10**9)
    assert (short.longest, short.longest_source) == (409, 409)  # a tenth of the longest, for both
    assert "a source of 4096 positions does not fit: longer ones than 409 are refused" in short.warnings


def test_a_solo_encoder_decoder_has_one_account_for_both() -> None:
    kv = replace(TWO_SIDES, lane="solo", bytes_fixed=10_000)
    plan = make_plan(demand(kv=kv, max_source_len=4096, kv_cache_memory=110_000), free_bytes=10**9)
    assert (plan.longest, plan.longest_source) == (100, 200)
    plan = make_plan(demand(kv=kv, max_source_len=4096, kv_cache_memory=10_000_000), free_bytes=10**9)
    assert plan.lengths[0].num_fitting == 10_000_000 // (10_000 + 512 * 1500)


def test_a_static_cache_is_all_of_it_or_nothing() -> None:
    fits = make_plan(demand(is_static=True, max_model_len=256), free_bytes=10**9)
    (length,) = fits.lengths
    assert (length.num_tokens, length.batch_bytes, length.num_fitting) == (256, 4 * 256_000, 4)
    tight = make_plan(demand(is_static=True, max_model_len=256), free_bytes=10_000_000 + 1_280_000)
    assert tight.fits and tight.kv_budget_bytes == 1_024_000
    refused = make_plan(demand(is_static=True, max_model_len=256), free_bytes=10_000_000 + 1_279_998)
    assert refused.problems == ("--static-cache True: 1024000 bytes of slots, and 1023998 are free for it",)
    assert refused.lengths[0].num_fitting == 0
    sides = demand(is_static=True, kv=TWO_SIDES, max_model_len=100, max_source_len=200, is_source_fixed=True)
    assert make_plan(sides, free_bytes=10**9).lengths[0].batch_bytes == 4 * (100_000 + 100_000)


def test_it_does_not_fit_when_the_weights_or_the_kv_memory_do_not() -> None:
    too_large = make_plan(demand(), free_bytes=9_000_000)
    assert too_large.problems == ("the weights need 1000000 bytes more than are free",)
    assert (too_large.longest, too_large.kv_budget_bytes) == (0, 0)
    report = make_plan(demand(loading_bytes=40_000_000), free_bytes=30_000_000)
    assert report.problems == ("loading needs 40000000 bytes for a while, and 30000000 are free",)
    greedy = make_plan(demand(kv_cache_memory=5_000_001), free_bytes=15_000_000)
    assert greedy.problems == ("--kv-cache-memory 5000001: 5000000 bytes are left after the weights",)
    assert make_plan(demand(kv_cache_memory=5_000_000), free_bytes=15_000_000).fits
    crumbs = make_plan(demand(kv_cache_memory=999), free_bytes=15_000_000)
    assert crumbs.problems == ("not one token of KV fits into 999 bytes",)


def test_less_than_asked_is_a_warning() -> None:
    plan = make_plan(demand(kv_cache_memory=1_000_000), free_bytes=20_000_000)
    assert plan.fits
    assert plan.warnings == ("a sequence of 4096 tokens does not fit: longer ones than 1000 are refused",)
    activations = estimate_activations(demand(), 4096)
    tight = make_plan(demand(kv_cache_memory=5_000_000), free_bytes=15_000_000 + activations - 1)
    assert tight.fits and "are left for activations" in tight.warnings[-1]
    assert make_plan(demand(kv_cache_memory=5_000_000), free_bytes=15_000_000 + activations).warnings == ()


def test_without_kv_the_weights_alone_decide() -> None:
    unknown = demand(kv=None)
    assert make_plan(unknown, free_bytes=20_000_000).fits
    assert make_plan(unknown, free_bytes=20_000_000).lengths == ()
    assert not make_plan(unknown, free_bytes=9_000_000).fits


def test_activations_grow_with_the_step_and_for_whole_prompts_with_the_prompt() -> None:
    chunked, whole = demand(), demand(kv=SOLO)
    assert estimate_activations(replace(chunked, num_step_tokens=1024), 512) > estimate_activations(chunked, 512)
    # Scores of a block alone: a chunk is as long as ever.
    assert estimate_activations(chunked, 4096) - estimate_activations(chunked, 512) == 4 * 128 * (4096 - 512) * 2
    assert estimate_activations(whole, 512) == estimate_activations(chunked, 512)
    assert estimate_activations(whole, 4096) > 2 * estimate_activations(chunked, 4096)
    assert estimate_activations(replace(chunked, scratch_bytes=7), 512) == estimate_activations(chunked, 512) + 7
