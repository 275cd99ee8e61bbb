"""What a dry run looks like on a terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.model.blueprint import WeightBytes, Widths
from engine.model.kv_cost import KVCost
from runtime.checkpoint import StoredWeights
from runtime.plan import Demand, make_plan
from runtime.plan_text import plan_text
from runtime.planning import DryRun

GIB = 2**30
FLAT = KVCost("flat", False, "if the check at load finds its logits exact, else solo", bytes_per_token=2**17)


def found(*, kv: KVCost | None = FLAT, free_bytes: int = 24 * GIB, **changes: Any) -> DryRun:
    weights = WeightBytes({"bfloat16": 12 * GIB, "float32": 2**20}, buffers=512, packed_head=0, num_parameters=6 * GIB)
    values: dict[str, Any] = {
        "resident_bytes": weights.total,
        "loading_bytes": weights.total,
        "scratch_bytes": 0,
        "widths": Widths(4096, 11008, 32, 32000, 2),
        "num_step_tokens": 512,
        "kv": kv,
        "kv_cache_memory": None,
        "kv_share": 0.8,
        "max_num_seqs": 20,
        "max_model_len": 4096,
        "max_source_len": None,
        "is_source_fixed": False,
        "is_static": False,
        "smallest_slot": 128,
    }
    demand = Demand(**{**values, **changes})
    return DryRun(
        model="some/model",
        architecture="LlamaForCausalLM",
        device="cpu",
        dtype="bfloat16",
        stored=StoredWeights({"bfloat16": 12 * GIB}, num_files=2, num_tensors=300),
        why_not_stored="",
        quantised_by=None,
        weights=weights,
        kv=kv,
        why_no_kv="" if kv is not None else "RuntimeError: a value was needed",
        demand=demand,
        free_bytes=free_bytes,
        plan=make_plan(demand, free_bytes),
    )


def test_a_plan_reads_so() -> None:
    lines = plan_text(found()).splitlines()
    assert lines[:8] == [
        "model         some/model (LlamaForCausalLM), in bfloat16 on cpu",
        "on disk       12.0 GiB in 2 files: bfloat16 12.0 GiB",
        "in memory     12.0 GiB, 6,442,450,944 parameters: bfloat16 12.0 GiB, float32 1.0 MiB",
        "              + 512 bytes of tables that are no parameters",
        "lane          flat if the check at load finds its logits exact, else solo",
        "KV            131,072 bytes a token",
        "memory        24.0 GiB free, 12.0 GiB with the weights loaded, 9.6 GiB for KV (80% of that)",
        "              never more than 21.7 GiB in all: whatever comes, KV stays within its share",
    ]
    head, short, middle, long = lines[9:13]
    assert head.split("  ")[-1].strip() == "fit at once" and "20 sequences" in head
    assert [row.split()[0] for row in (short, middle, long)] == ["512", "2,048", "4,096"]
    assert [row.split()[-1] for row in (short, middle, long)] == ["153", "38", "19"]
    assert len({len(line) for line in (head, short, middle, long)}) == 1  # a table
    assert lines[-1].startswith("fits: up to 20 sequences a step, the longest of 4,096 tokens")


def test_the_verdict_names_what_is_missing() -> None:
    assert plan_text(found(free_bytes=8 * GIB)).splitlines()[-1].startswith("does not fit: the weights need ")
    tight = plan_text(found(kv_cache_memory=2**20)).splitlines()
    assert tight[-2] == "warning: a sequence of 4096 tokens does not fit: longer ones than 8 are refused"
    assert tight[-1].startswith("fits: ")


def test_a_static_cache_is_shown_with_its_arithmetic() -> None:
    text = plan_text(found(is_static=True, max_model_len=256))
    assert "static, decoder: 131072 bytes a token x 256 positions = 33554432 bytes a slot x 20 slots" in text
    sides = replace(FLAT, lane="seq2seq", bytes_per_source_position=1000)
    text = plan_text(found(kv=sides, is_static=True, max_model_len=448, max_source_len=1500, is_source_fixed=True))
    assert "static, encoder: 1000 bytes a token x 1500 positions = 1500000 bytes a slot x 20 slots = 30000000" in text


def test_what_a_sequence_keeps_is_told_by_kind() -> None:
    solo = KVCost("solo", True, "its layers include conv", 100, bytes_fixed=2048, windows=(3, 4096))
    text = plan_text(found(kv=solo))
    assert "lane          solo: its layers include conv" in text
    assert "+ 2.0 KiB of state for each sequence" in text
    assert "3 layers see 4,096 tokens back and no further; longer sequences take less than shown" in text
    assert "all positions are kept nevertheless" in plan_text(found(kv=replace(FLAT, windows=(3, 4096))))
    sides = KVCost("seq2seq", False, "if exact", 6144, bytes_per_source_position=4096)
    text = plan_text(found(kv=sides, max_model_len=448, max_source_len=1500, is_source_fixed=True))
    assert "6,144 bytes a token of output, 4,096 a source's position" in text
    assert "every source takes 1,500 positions: 5.9 MiB a request" in text
    assert "source" in text.splitlines()[-4]
    assert "the longest of 448 tokens from a source of 1,500 positions" in text.splitlines()[-1]


def test_what_is_not_known_is_said_so() -> None:
    text = plan_text(found(kv=None))
    assert "lane          decided by the check at load" in text
    assert "cannot be told without weights (RuntimeError: a value was needed)" in text
    assert text.splitlines()[-1] == "the weights fit; what a sequence takes shows at load"
    guess = plan_text(found(kv=KVCost("solo", False, "the check at load decides", 100)))
    assert "lane          decided by the check at load" in guess
    offline = plan_text(replace(found(), stored=None, why_not_stored="no network"))
    assert "on disk       not known: the headers could not be read (no network)" in offline
    packed = plan_text(replace(found(), quantised_by="fp8"))
    assert "quantised by fp8; counted below as unpacked" in packed


def test_int4_and_copies_are_told() -> None:
    weights = WeightBytes({"int4": GIB}, 0, 2**20, num_parameters=2 * GIB, num_quantised=7, scratch=9)
    text = plan_text(replace(found(), weights=weights))
    assert "7 linear layers in int4; embeddings, head and the rest as they are" in text
    assert "+ up to 1.0 MiB: a packed copy of the head" in text
