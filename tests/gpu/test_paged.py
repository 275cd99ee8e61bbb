"""On a CUDA device: the paged kernel agrees with its plain twin, and engines over pages give the tokens of generate().

The tokens themselves are compared in test_lanes.py; here it is seen that pages, not slots, gave them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.attention import AttentionCall
from engine.model.flash import FlashAttention
from engine.model.loader import describe
from engine.model.paged_attention import KernelAttention, attend_blocks, kernel_for
from engine.model.paged_runner import PagedRunner
from tests import zoo
from tests.engine.harness import drive, greedy, tiny_model, tokens
from tests.engine.model.paged_drawings import draw

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RUNS = [(0, 1), (31, 1), (32, 1), (700, 1), (0, 300), (45, 33), (63, 2)]
SINGLES = [(length - 1, 1) for length in (1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 1000, 2048)]


def _kernel(num_sms: int | None = None) -> KernelAttention:
    device = torch.device("cuda")
    own = torch.cuda.get_device_properties(device).multi_processor_count
    return KernelAttention(device, own if num_sms is None else num_sms)


HEADS_AND_DIMS = pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((8, 8), (128, 128)),
        ((14, 2), (64, 64)),
        ((32, 1), (16, 16)),
        ((4, 4), (24, 20)),
        ((4, 2), (192, 128)),
        ((4, 2), (256, 256)),
        ((6, 2), (80, 80)),
        ((8, 2), (96, 96)),
    ],
)


@HEADS_AND_DIMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_extras", [False, True])
def test_the_kernel_agrees_with_its_twin(
    heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, has_extras: bool
) -> None:
    drawn = draw(RUNS, heads=heads, dims=dims, dtype=dtype, device="cuda")
    call = AttentionCall(dims[0] ** -0.5, None, None, None)
    if has_extras:
        call = AttentionCall(dims[0] ** -0.5, 50, 1.5, drawn.sinks)
    got = _kernel()(drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    wanted = attend_blocks(drawn.query.float(), drawn.keys.float(), drawn.values.float(), drawn.inputs, call)
    torch.testing.assert_close(got.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@HEADS_AND_DIMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
def test_split_or_not_single_tokens_see_the_same_and_each_way_gives_the_same_bits_again(
    heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, window: int | None
) -> None:
    drawn = draw(SINGLES, heads=heads, dims=dims, dtype=dtype, device="cuda")
    call = AttentionCall(dims[0] ** -0.5, window, None, drawn.sinks)
    arguments = (drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    wanted = attend_blocks(drawn.query.float(), drawn.keys.float(), drawn.values.float(), drawn.inputs, call)
    for num_sms in (0, 4096):  # none is split; all are, as far as their keys allow
        kernel = _kernel(num_sms)
        first = kernel(*arguments)
        torch.testing.assert_close(first.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        # The programs end in another order each time.
        assert all(torch.equal(kernel(*arguments), first) for _ in range(50))
        assert not kernel._counters.any()


def test_a_captured_launch_serves_lengths_it_was_not_captured_with() -> None:
    drawn = draw([(2047, 1), (100, 1)], heads=(8, 2), dims=(128, 128), dtype=torch.bfloat16, device="cuda")
    kernel = _kernel()
    call = AttentionCall(128**-0.5, None, None, None)
    arguments = (drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    kernel(*arguments)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = kernel(*arguments)
    for lengths in ((2048, 101), (1, 1), (129, 64), (1500, 33)):
        drawn.inputs.context_lens.copy_(torch.tensor(lengths))
        graph.replay()
        wanted = attend_blocks(drawn.query, drawn.keys, drawn.values, replace(drawn.inputs, lengths=lengths), call)
        torch.testing.assert_close(out, wanted, atol=3e-2, rtol=3e-2)
        assert torch.equal(out, kernel(*arguments))


@pytest.mark.parametrize(("heads", "num_rows"), [((32, 32), 1), ((14, 2), 1), ((32, 8), 4), ((32, 8), 64)])
def test_decode_reads_keys_and_values_at_a_fair_share_of_what_copies_reach(
    heads: tuple[int, int], num_rows: int
) -> None:
    context, dim = 8192, 128
    drawn = draw([(0, 1)] * num_rows, heads=heads, dims=(dim, dim), dtype=torch.bfloat16, device="cuda")
    num_blocks = context // 32
    tables = torch.randperm(num_rows * num_blocks).view(num_rows, num_blocks).cuda()
    inputs = replace(
        drawn.inputs,
        block_tables=tables,
        context_lens=torch.full((num_rows,), context, device="cuda"),
        lengths=(context,) * num_rows,
    )
    shape = (num_rows * num_blocks, 32, heads[1], dim)
    layers = 8 if num_rows == 1 else 2  # more than the card's cache holds
    caches = [[torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)] for _ in range(layers)]
    kernel = _kernel()
    call = AttentionCall(dim**-0.5, None, None, None)

    def attend() -> None:
        for keys, values in caches:
            kernel(drawn.query, keys, values, inputs, call)

    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    copied_per_s = 2 * source.nbytes / _seconds(source.clone)
    read_per_s = sum(keys.nbytes + values.nbytes for keys, values in caches) / _seconds(attend)
    print(f"{heads} x {num_rows}: {read_per_s / 1e9:.0f} GB/s of {copied_per_s / 1e9:.0f}")
    # Alone, a row of few heads cannot: 2 heads of 8,192 keys are 8 MB, and half the time is the launch.
    assert read_per_s > copied_per_s * (0.05 if num_rows * heads[1] < 16 else 0.3)


def _seconds(work: Callable[[], object]) -> float:
    """Of one run inside a captured graph, so that the host's part does not count; the least of a few."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times: list[float] = []
    for _ in range(10):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return min(times)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="no flash-attn")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_flash_agrees_with_the_twin(heads: tuple[int, int], dim: int, window: int | None, dtype: torch.dtype) -> None:
    attention = kernel_for(torch.device("cuda"))
    assert isinstance(attention, FlashAttention)
    drawn = draw([*RUNS, (0, 70)], heads=heads, dims=(dim, dim), dtype=dtype, device="cuda")
    slots = drawn.inputs.slot_mapping
    own = tuple(cached.flatten(0, 1)[slots].transpose(0, 1) for cached in (drawn.keys, drawn.values))
    call = AttentionCall(dim**-0.5, window, None, None)
    got = attention(drawn.query, drawn.keys, drawn.values, drawn.inputs, call, (own[0], own[1]))
    wanted = attend_blocks(drawn.query.float(), drawn.keys.float(), drawn.values.float(), drawn.inputs, call)
    torch.testing.assert_close(got.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert list(attention._agrees.values()) == [True]


def _engine(name: str, config: dict[str, Any]) -> Engine:
    return build_engine(describe(tiny_model(name).cuda()), EngineConfig(**config), lambda _what, _share: None)


def _generate(name: str, prompt: list[int], num_tokens: int) -> list[int]:
    input_ids = torch.tensor([prompt], device="cuda")
    output = tiny_model(name).cuda().generate(input_ids, do_sample=False, max_new_tokens=num_tokens)
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 12}, {"num_pages": 10}])
def test_an_engine_keeps_pages_and_gives_the_tokens_of_generate(name: str, limits: dict[str, Any]) -> None:
    config = {"max_num_seqs": 8, "max_batch_tokens": 256, "max_model_len": 256, **limits}
    num_pages = config.pop("num_pages", None)
    if num_pages is not None:  # too few for all: some are preempted
        config["kv_budget_bytes"] = num_pages * 32 * _engine(name, config).lane.kv_bytes_per_token
    engine = _engine(name, config)
    assert isinstance(engine.runner, PagedRunner)
    prompts = [zoo.prompt(12 + 5 * n, seed=n) for n in range(6)]
    expected = [_generate(name, prompt, 120) for prompt in prompts]
    for _ in range(2):
        outputs = drive(engine, [greedy(n, prompt, 120) for n, prompt in enumerate(prompts)])
        assert [tokens(outputs[n]) for n in range(6)] == expected
    assert (engine.stats().preemptions_total > 0) == (num_pages is not None)


def test_no_step_makes_the_kernel_compile_again_once_the_engine_is_built() -> None:
    from engine.model import paged_kernel

    engine = _engine("mistral", {"max_num_seqs": 8, "max_batch_tokens": 64, "max_model_len": 256})  # some are split

    def num_compiled() -> int:
        return sum(len(entry[0]) for entry in paged_kernel._paged_attention.device_caches.values())

    before = num_compiled()
    assert before > 0
    drive(engine, [greedy(n, zoo.prompt(20 * n + 1, seed=n), 60) for n in range(8)])
    assert num_compiled() == before
