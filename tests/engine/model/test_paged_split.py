"""A token's keys split over programs give what one program and the plain twin give, whatever the lengths."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.model.attention import AttentionCall
from engine.model.paged_attention import KernelAttention, attend_blocks
from engine.model.paged_check import KernelDisagrees
from engine.model.paged_inputs import PagedInputs
from tests.engine.model.paged_drawings import Drawing, draw

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="no triton, or a GPU to run on instead (tests/gpu)",
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LENGTHS = (1, 2, 31, 32, 33, 64, 127, 128, 129, 255, 256, 257, 384, 449)
MANY_SMS = 1024  # every row is split as far as its keys allow


def _kernel(num_sms: int) -> KernelAttention:
    return KernelAttention(torch.device("cpu"), num_sms)


def _singles(lengths: tuple[int, ...], **how: Any) -> Drawing:
    return draw([(length - 1, 1) for length in lengths], **how)


def _call(dim: int, *, window: int | None = None, softcap: float | None = None, sinks: Any = None) -> AttentionCall:
    return AttentionCall(dim**-0.5, window, softcap, sinks)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """In how many programs for each row and head the launches of a test went."""
    from engine.model import paged_kernel

    seen: list[int] = []
    launch = paged_kernel.launch_singles

    def spy(*arguments: Any, **named: Any) -> None:
        seen.append(1 if named["scratch"] is None else named["scratch"].num_splits)
        launch(*arguments, **named)

    monkeypatch.setattr(paged_kernel, "launch_singles", spy)
    yield seen


@pytest.mark.parametrize(
    ("heads", "dims", "lengths"),
    [
        ((1, 1), (64, 64), LENGTHS),
        ((4, 2), (96, 96), (1, 128, 300)),
        ((4, 1), (128, 128), (33, 400)),
        ((8, 1), (64, 64), (257, 1, 384)),
        ((2, 1), (256, 256), (129, 300)),
        ((3, 1), (80, 80), (160, 500)),  # a group that is no power of 2
        ((2, 2), (24, 20), (300, 5)),  # keys wider than values, neither a power of 2
        ((2, 1), (192, 128), (257, 20)),
        ((32, 1), (16, 16), (200, 129)),  # more heads than the least rows of a tile
        ((1, 1), (16, 16), (2310, 2100)),  # more parts than are combined at once
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_or_not_a_token_sees_the_same(
    heads: tuple[int, int], dims: tuple[int, int], lengths: tuple[int, ...], dtype: torch.dtype, splits: list[int]
) -> None:
    drawn = _singles(lengths, heads=heads, dims=dims, dtype=dtype)
    call = _call(dims[0])
    arguments = (drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    whole = _kernel(0)(*arguments)
    assert splits == [1]
    split = _kernel(MANY_SMS)(*arguments)
    assert splits[-1] == -(-drawn.inputs.block_tables.shape[1] * 32 // 128) > 1
    wanted = attend_blocks(drawn.query.float(), drawn.keys.float(), drawn.values.float(), drawn.inputs, call)
    for got in (whole, split):
        assert got.dtype is dtype
        torch.testing.assert_close(got.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 1, 64, 200])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_windows_softcaps_and_sinks_are_those_of_the_whole(
    window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    drawn = _singles((1, 128, 199, 200, 201, 430), dims=(16, 12))
    call = _call(16, window=window, softcap=softcap, sinks=drawn.sinks * 3 if has_sinks else None)
    arguments = (drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    torch.testing.assert_close(_kernel(MANY_SMS)(*arguments), attend_blocks(*arguments), atol=1e-5, rtol=1e-5)


def test_singles_are_split_beside_longer_runs() -> None:
    drawn = draw([(0, 70), (300, 1), (45, 33), (0, 1), (511, 1)])
    arguments = (drawn.query, drawn.keys, drawn.values, drawn.inputs, _call(16))
    torch.testing.assert_close(_kernel(MANY_SMS)(*arguments), attend_blocks(*arguments), atol=1e-5, rtol=1e-5)


def test_the_same_kernel_serves_again_and_gives_the_same_bits() -> None:
    kernel = _kernel(MANY_SMS)
    results = []
    for seed in (0, 1, 0, 1):
        drawn = _singles((700, 300), seed=seed)
        results.append(kernel(drawn.query, drawn.keys, drawn.values, drawn.inputs, _call(16)))
        assert not kernel._counters.any()
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])


def _padded(inputs: PagedInputs, num_rows: int, num_blocks: int) -> PagedInputs:
    """As a captured step has them: more rows than sequences, tables for the longest, no lengths but bounds."""
    tables = torch.zeros(num_rows, num_blocks, dtype=torch.int64)
    tables[: inputs.num_singles, : inputs.block_tables.shape[1]] = inputs.block_tables
    lens = torch.ones(num_rows, dtype=torch.int64)
    lens[: inputs.num_singles] = inputs.context_lens
    return replace(
        inputs,
        query_starts=torch.arange(num_rows + 1),
        context_lens=lens,
        block_tables=tables,
        num_singles=num_rows,
        query_lens=(1,) * num_rows,
        lengths=(num_blocks * 32,) * num_rows,
    )


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("num_sms", [8, MANY_SMS])
def test_a_step_that_is_padded_for_capturing_gives_the_same_bits(
    window: int | None, num_sms: int, splits: list[int]
) -> None:
    drawn = _singles((450, 33, 129))
    call = _call(16, window=window)
    expected = _kernel(num_sms)(drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    assert splits[-1] > 1
    kernel = _kernel(num_sms)
    captured = _padded(drawn.inputs, 4, 64)
    query = torch.cat([drawn.query, torch.zeros_like(drawn.query[:1])])
    assert torch.equal(kernel(query, drawn.keys, drawn.values, captured, call)[:3], expected)
    # The tensors are filled anew between replays, and the grid stays.
    captured.context_lens.copy_(torch.tensor([300, 20, 128, 1]))
    shorter = replace(drawn.inputs, context_lens=captured.context_lens[:3], lengths=(300, 20, 128))
    torch.testing.assert_close(
        kernel(query, drawn.keys, drawn.values, captured, call)[:3],
        attend_blocks(drawn.query, drawn.keys, drawn.values, shorter, call),
        atol=1e-5,
        rtol=1e-5,
    )


def test_few_rows_are_split_to_fill_a_device_and_many_are_left_whole() -> None:
    from engine.model.paged_split import MAX_SPLITS, num_splits

    assert num_splits(1, 32, 4096, 132) == 8  # 264 programs fit 132 SMs at once
    assert num_splits(4, 8, 4096, 132) == 8
    assert num_splits(3, 8, 4096, 132) == 8  # as padded to 4
    assert num_splits(1, 2, 2048, 132) == 16  # 128 keys each
    assert num_splits(1, 1, 1 << 20, 132) == MAX_SPLITS
    assert num_splits(8, 32, 4096, 132) == 1
    assert num_splits(1, 32, 128, 132) == 1
    assert num_splits(1, 1, 4096, 0) == 1


@pytest.mark.parametrize("num_sms", [0, 1, 7, 132])
def test_a_device_that_splits_has_a_counter_for_every_row_and_head(num_sms: int) -> None:
    from engine.model.paged_split import num_counters, num_splits

    for num_rows in range(1, 300):
        for num_heads in (1, 2, 7, 32):
            if num_splits(num_rows, num_heads, 1 << 20, num_sms) > 1:
                assert num_rows * num_heads <= num_counters(num_sms)


@pytest.mark.parametrize("window", [None, 4096])
def test_the_first_call_of_a_kind_tries_both_ways_and_no_other_does(window: int | None, splits: list[int]) -> None:
    kernel = KernelAttention(torch.device("cpu"), 4, is_checked=True)
    short, long = _singles((40,)), _singles((400,))
    for drawn in (short, long, short):
        kernel(drawn.query, drawn.keys, drawn.values, drawn.inputs, _call(16, window=window))
    assert splits == [1, 3 if window is None else 2, 1, 4, 1]


def test_a_kernel_that_is_wrong_beyond_a_tile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.paged_attention.attend_blocks", _first_tile)
    drawn = _singles((40,))
    kernel = KernelAttention(torch.device("cpu"), 4, is_checked=True)
    with pytest.raises(KernelDisagrees, match=r"the paged kernel is off by \S+ for heads of 16 dimensions"):
        kernel(drawn.query, drawn.keys, drawn.values, drawn.inputs, _call(16))


def _first_tile(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: PagedInputs, call: Any) -> Any:
    """As if what lies past 64 keys were not there, which the kernel does not think."""
    return attend_blocks(query, keys, values, inputs, replace(call, window=64))
