"""Attention over blocks: the twin agrees with attention over the whole, and the kernel, interpreted, with the twin."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from engine.model.attention import AttentionCall
from engine.model.paged_attention import KernelAttention, attend_blocks, kernel_for
from engine.model.paged_step import write
from tests.engine.model.paged_drawings import draw

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Single tokens at the edges of blocks, a prompt, a chunk in the middle, a run shorter than a tile.
RUNS = [(0, 1), (31, 1), (32, 1), (100, 1), (0, 70), (45, 33), (63, 2)]

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="no triton, or a GPU to run on instead (tests/gpu)",
)


def _kernel(*arguments: Any) -> torch.Tensor:
    return KernelAttention(torch.device("cpu"), num_sms=0)(*arguments)


def _call(
    *, window: int | None = None, softcap: float | None = None, sinks: torch.Tensor | None = None
) -> AttentionCall:
    return AttentionCall(0.3, window, softcap, sinks)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_twin_sees_a_sequence_as_if_it_lay_in_one_piece(
    window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    drawn = draw(RUNS, dims=(16, 12))
    call = _call(window=window, softcap=softcap, sinks=drawn.sinks if has_sinks else None)
    got = attend_blocks(drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    first = 0
    for row, item in enumerate(drawn.inputs.items):
        for position in range(item.start, item.stop):
            begin = 0 if window is None else max(0, position - window + 1)
            seen = [
                torch.stack(
                    [cache[drawn.inputs.block_tables[row, p // 32], p % 32] for p in range(begin, position + 1)]
                )
                for cache in (drawn.keys, drawn.values)
            ]  # [L, Hkv, D] each
            for head in range(4):
                scores = seen[0][:, head // 2].double() @ drawn.query[first, head].double() * 0.3
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                if has_sinks:
                    scores = torch.cat([scores, drawn.sinks[head : head + 1].double()])
                wanted = scores.softmax(0)[: position + 1 - begin] @ seen[1][:, head // 2].double()
                torch.testing.assert_close(got[first, head].double(), wanted, atol=1e-5, rtol=1e-5)
            first += 1
    assert first == drawn.query.shape[0]


def test_written_tokens_are_where_the_tables_say() -> None:
    drawn = draw(RUNS)
    new = torch.randn(drawn.query.shape[0], 2, 16)
    write(drawn.keys, new, drawn.inputs.slot_mapping)
    first = 0
    for row, item in enumerate(drawn.inputs.items):
        for position in range(item.start, item.stop):
            block = drawn.inputs.block_tables[row, position // 32]
            assert torch.equal(drawn.keys[block, position % 32], new[first])
            first += 1


@interpreted
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_kernel_agrees_with_its_twin(window: int | None, softcap: float | None, has_sinks: bool) -> None:
    drawn = draw(RUNS)
    call = _call(window=window, softcap=softcap, sinks=drawn.sinks if has_sinks else None)
    arguments = (drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    torch.testing.assert_close(_kernel(*arguments), attend_blocks(*arguments), atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((1, 1), (64, 64)),
        ((14, 2), (64, 64)),  # a group that is no power of 2
        ((32, 1), (16, 16)),  # more heads than the least rows of a tile
        ((4, 4), (24, 20)),  # keys wider than values, neither a power of 2
        ((2, 1), (192, 128)),
        ((2, 1), (256, 256)),
        ((6, 2), (80, 80)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_takes_any_heads(heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> None:
    drawn = draw([(70, 1), (0, 1), (33, 40)], heads=heads, dims=dims, dtype=dtype)
    call = _call(window=50)
    got = _kernel(drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    wanted = attend_blocks(drawn.query.float(), drawn.keys.float(), drawn.values.float(), drawn.inputs, call)
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@interpreted
def test_the_kernel_reads_queries_as_they_lie() -> None:
    drawn = draw([(10, 1), (5, 3)])
    as_models_make_them = drawn.query.transpose(0, 1).contiguous().transpose(0, 1)
    backwards = drawn.query.flip(2).contiguous().flip(2)
    strided = torch.stack([drawn.query, drawn.query], dim=-1)[..., 0]
    expected = _kernel(drawn.query, drawn.keys, drawn.values, drawn.inputs, _call())
    for query in (as_models_make_them, backwards, strided):
        assert torch.equal(_kernel(query, drawn.keys, drawn.values, drawn.inputs, _call()), expected)


@interpreted
def test_a_head_too_wide_is_refused() -> None:
    drawn = draw([(0, 1)], dims=(257, 16))
    with pytest.raises(ValueError, match="257 dimensions, the paged kernel takes 256"):
        _kernel(drawn.query, drawn.keys, drawn.values, drawn.inputs, _call())


def test_the_cpu_has_no_kernel() -> None:
    assert kernel_for(torch.device("cpu")) is None
