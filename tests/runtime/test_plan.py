"""The arithmetic of a plan, against the accounting that the engine really uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.kv.pool import SlotOp, SlotPool, size_classes
from engine.model.blueprint import Widths
from engine.model.kv_cost import KVCost
from runtime.plan import Demand, estimate_activations, make_plan

FLAT = KVCost("flat", False, "", bytes_per_token=1000)
SOLO = KVCost("solo", True, "", bytes_per_token=100, bytes_fixed=50_000)
SPEECH = KVCost(
    "seq2seq", True, "", bytes_per_token=1000, bytes_per_source_position=1000, num_source_positions=1500
)  # fmt: skip
TEXT = replace(SPEECH, num_source_positions=None)
WIDTHS = Widths(hidden=64, widest=256, num_heads=4, vocab_size=1000, itemsize=2)


def demand(**changes: Any) -> Demand:
    values: dict[str, Any] = {
        "resident_bytes": 10_000_000,
        "scratch_bytes": 0,
        "widths": WIDTHS,
        "num_step_tokens": 512,
        "kv": FLAT,
        "kv_cache_memory": None,
        "kv_share": 0.8,
        "max_num_seqs": 4,
        "max_model_len": 4096,
        "max_source_len": None,
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


def test_a_source_counts_beside_the_output() -> None:
    speech = make_plan(demand(kv=SPEECH, max_model_len=448), free_bytes=10**9)
    (only,) = speech.lengths
    assert (only.num_source_positions, only.used_bytes) == (1500, 448_000 + 1_500_000)
    text = make_plan(demand(kv=TEXT, max_model_len=512), free_bytes=10**9)
    assert (text.lengths[0].num_source_positions, text.lengths[0].used_bytes) == (512, 1_024_000)
    # Not even one output token beside a source, and the longest source that has room for as long an output.
    assert not make_plan(demand(kv=SPEECH, max_model_len=448, kv_cache_memory=1_400_000), free_bytes=10**9).fits
    assert make_plan(demand(kv=SPEECH, max_model_len=448, kv_cache_memory=1_600_000), free_bytes=10**9).longest == 100
    assert make_plan(demand(kv=TEXT, kv_cache_memory=1_000_000), free_bytes=10**9).longest == 500


def test_a_static_cache_is_all_of_it_or_nothing() -> None:
    fits = make_plan(demand(is_static=True, max_model_len=256), free_bytes=10**9)
    (length,) = fits.lengths
    assert (length.num_tokens, length.batch_bytes, length.num_fitting) == (256, 4 * 256_000, 4)
    tight = make_plan(demand(is_static=True, max_model_len=256), free_bytes=10_000_000 + 1_280_000)
    assert tight.fits and tight.kv_budget_bytes == 1_024_000
    refused = make_plan(demand(is_static=True, max_model_len=256), free_bytes=10_000_000 + 1_279_998)
    assert refused.problems == ("--static-cache True: 1024000 bytes of slots, and 1023998 are free for it",)
    assert refused.lengths[0].num_fitting == 0
    both = make_plan(demand(is_static=True, kv=TEXT, max_model_len=100, max_source_len=200), free_bytes=10**9)
    assert both.lengths[0].batch_bytes == 4 * (100_000 + 200_000)


def test_it_does_not_fit_when_the_weights_or_the_kv_memory_do_not() -> None:
    too_large = make_plan(demand(), free_bytes=9_000_000)
    assert too_large.problems == ("the weights need 1000000 bytes more than are free",)
    assert (too_large.longest, too_large.kv_budget_bytes) == (0, 0)
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
