"""The native attention gives what its twin gives, and leaves the same K and V behind."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.batch import Batch, ScheduledSequence
from engine.kv.pool import ResizeArena, Slot
from engine.kv.slots import LayerShape, SlotStorage
from engine.model.attention import AttentionCall, attend_flat, attend_sources
from engine.model.cross_attention import CrossStep, build_cross
from engine.model.encoder_attention import attend_in_blocks
from engine.model.inputs import FlatInputs, build_inputs
from engine.model.native_step import can_attend, native_attention, native_step
from engine.model.step import FlatStep
from engine.sequence import SamplingParams, Sequence, Source
from tests.int4_weights import CAN_COMPILE, native_kernels

pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")

CPU = torch.device("cpu")
# Of a sequence: its slot's capacity, the keys it has in the end, and how many of its tokens are new.
SINGLES = {0: (8, 1, 1), 1: (512, 33, 1), 2: (512, 64, 1), 3: (8, 8, 1), 4: (512, 5, 1)}
RUNS = {0: (512, 3, 2), 1: (8, 8, 1), 2: (512, 70, 70), 3: (512, 512, 190), 4: (8, 7, 5), 5: (512, 300, 1)}
LAYERS = 2


def filled(shape: LayerShape, *arenas: ResizeArena) -> SlotStorage:
    """Arenas full of random K and V."""
    storage = SlotStorage([shape] * LAYERS, CPU)
    storage.apply(arenas)
    generator = torch.Generator().manual_seed(0)
    for arena in storage.arenas.values():
        for tensor in (*arena.keys, *arena.values):
            tensor.normal_(generator=generator)
    return storage


def step_of(shape: LayerShape, lengths: dict[int, tuple[int, int, int]]) -> tuple[SlotStorage, FlatInputs]:
    """A step of sequences in two arenas full of random K and V."""
    storage = filled(shape, ResizeArena(8, (), 6), ResizeArena(512, (), 6))
    return storage, inputs_over(storage, lengths)


def inputs_over(storage: SlotStorage, lengths: dict[int, tuple[int, int, int]]) -> FlatInputs:
    items = tuple(
        ScheduledSequence(
            Sequence(n, [1] * length, SamplingParams(max_tokens=1), arrival_time_s=0.0), length - count, count, 1
        )
        for n, (_, length, count) in lengths.items()
    )
    return build_inputs(Batch(items), lambda s: Slot(lengths[s.sequence_id][0], s.sequence_id), storage, CPU)


@pytest.mark.parametrize("lengths", [pytest.param(SINGLES, id="singles"), pytest.param(RUNS, id="runs")])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "key_dim", "value_dim", "dtype"),
    [
        pytest.param(9, 3, 64, 64, torch.bfloat16, id="GQA"),
        pytest.param(4, 4, 32, 16, torch.bfloat16, id="small"),
        pytest.param(10, 2, 192, 128, torch.bfloat16, id="unlike sizes"),
        pytest.param(6, 1, 16, 48, torch.float32, id="float32"),
        pytest.param(300, 1, 32, 16, torch.float32, id="more heads than a block has rows"),
    ],
)
def test_runs_of_any_length_are_attended_to_as_by_the_twin(
    num_heads: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    num_threads: int,
    lengths: dict[int, tuple[int, int, int]],
) -> None:
    storage, inputs = step_of(LayerShape(num_kv_heads, key_dim, value_dim, dtype), lengths)
    num_tokens = inputs.input_ids.shape[1]
    twin = copy.deepcopy(storage)
    generator = torch.Generator().manual_seed(1)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for layer, (window, softcap, has_sinks) in enumerate([(None, None, False), (40, 2.0, True)]):
            # [T, H, D] in memory, as a projection leaves them.
            query, key, value = (
                torch.randn(1, num_tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)
                for heads, dim in ((num_heads, key_dim), (num_kv_heads, key_dim), (num_kv_heads, value_dim))
            )
            assert can_attend(query, key, value)
            sinks = torch.randn(num_heads, generator=generator).to(dtype) if has_sinks else None
            call = AttentionCall(key_dim**-0.5, window, softcap, sinks)
            kernels = native_kernels()
            with native_step(kernels, inputs):
                got = kernels.attend_slots(query, key, value, sinks, layer, call.scaling, window, softcap)
            expected = attend_flat(inputs_over(twin, lengths), layer, query, key, value, call)
            tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
            for capacity, arena in storage.arenas.items():
                assert torch.equal(arena.keys[layer], twin.arenas[capacity].keys[layer])
                assert torch.equal(arena.values[layer], twin.arenas[capacity].values[layer])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lengths", [pytest.param(SINGLES, id="singles"), pytest.param(RUNS, id="runs")])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_row_of_nan_is_noticed_and_its_neighbours_are_not(
    softcap: float | None, lengths: dict[int, tuple[int, int, int]]
) -> None:
    _, inputs = step_of(LayerShape(2, 32, 16, torch.bfloat16), lengths)
    num_tokens = inputs.input_ids.shape[1]
    bad = num_tokens // 2
    query, key, value = (torch.ones(1, heads, num_tokens, dim).bfloat16() for heads, dim in ((4, 32), (2, 32), (2, 16)))
    query[:, :, bad] = float("nan")
    with native_step(native_kernels(), inputs):
        got = native_kernels().attend_slots(query, key, value, None, 0, 1.0, None, softcap)
    assert got.isnan().flatten(2).all(2).tolist() == [[row == bad for row in range(num_tokens)]]
    assert got.isnan().flatten(2).any(2).tolist() == [[row == bad for row in range(num_tokens)]]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "key_dim", "value_dim", "dtype"),
    [
        pytest.param(3, 3, 64, 64, torch.bfloat16, id="bfloat16"),
        pytest.param(6, 2, 32, 48, torch.float32, id="float32, grouped"),
    ],
)
@pytest.mark.parametrize("length", [1, 90, 700])
def test_whole_sequences_are_attended_to_as_by_the_twin(
    length: int, num_heads: int, num_kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, num_threads: int
) -> None:
    torch.manual_seed(length)
    query, key, value = (
        torch.randn(2, length, heads, dim).to(dtype).transpose(1, 2)
        for heads, dim in ((num_heads, key_dim), (num_kv_heads, key_dim), (num_kv_heads, value_dim))
    )
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        got = native_kernels().attend_positions(query, key, value, 0.3)
    finally:
        torch.set_num_threads(before)
    keys, values = (tensor.repeat_interleave(num_heads // num_kv_heads, dim=1) for tensor in (key, value))
    expected = attend_in_blocks(query, keys, values, 0.3)
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_whole_sequences_of_other_strides_are_refused() -> None:
    tensor = torch.zeros(1, 2, 32, 32).bfloat16()
    with pytest.raises(RuntimeError, match="one after the other"):
        native_kernels().attend_positions(tensor.transpose(2, 3), tensor, tensor, 1.0)


def test_outside_of_its_step_it_refuses() -> None:
    _, inputs = step_of(LayerShape(1, 32, 16, torch.bfloat16), SINGLES)
    query, key, value = (torch.ones(1, 1, 5, dim).bfloat16() for dim in (32, 32, 16))
    kernels = native_kernels()
    with pytest.raises(RuntimeError, match="not of the current step"):
        kernels.attend_slots(query, key, value, None, 0, 1.0, None, None)
    with native_step(kernels, inputs):
        for rows, layer in ((4, 0), (5, LAYERS)):
            q, k, v = (tensor[:, :, :rows] for tensor in (query, key, value))
            with pytest.raises(RuntimeError, match="not of the current step"):
                kernels.attend_slots(q, k, v, None, layer, 1.0, None, None)


def test_other_sizes_and_dtypes_are_the_twins() -> None:
    def kind(heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.ones(1, heads, 1, dim, dtype=dtype)

    half, single = torch.float16, torch.float32
    assert not can_attend(kind(2, 48), kind(2, 48), kind(2, 32))
    assert not can_attend(kind(2, 32), kind(2, 32), kind(2, 24))
    assert not can_attend(kind(2, 32, half), kind(2, 32, half), kind(2, 32, half))
    assert not can_attend(kind(2, 32, single), kind(2, 32), kind(2, 32))
    assert not can_attend(kind(3, 32), kind(2, 32), kind(2, 32))


def crossing(
    shape: LayerShape, lengths: list[tuple[int, int, int]]
) -> tuple[FlatInputs, CrossStep, SlotStorage, torch.Tensor]:
    """A step of sequences with sources: for each, its new tokens, its source's slot and the positions in it."""
    own = SlotStorage([shape] * LAYERS, CPU)
    own.apply([ResizeArena(64, (), len(lengths))])
    storage = filled(shape, ResizeArena(32, (), 9), ResizeArena(512, (), 9))
    items, slots = [], {}
    for number, (count, slot, length) in enumerate(lengths):
        source = Source(bytes([slot]), length)
        params = SamplingParams(max_tokens=1)
        sequence = Sequence(number, [1] * count, params, arrival_time_s=0.0, source=source)
        items.append(ScheduledSequence(sequence, 0, count, 1))
        slots[number] = Slot(32 if length <= 32 else 512, slot)
    inputs = build_inputs(Batch(tuple(items)), lambda s: Slot(64, s.sequence_id), own, CPU)
    marker = torch.zeros(1, shape.num_kv_heads, 1, shape.key_dim, dtype=shape.dtype)
    return inputs, build_cross(inputs, lambda s: slots[s.sequence_id], storage, marker, {}), own, marker


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "key_dim", "value_dim", "dtype"),
    [
        pytest.param(4, 4, 64, 64, torch.bfloat16, id="bfloat16"),
        pytest.param(6, 2, 32, 48, torch.float32, id="float32, grouped"),
    ],
)
@pytest.mark.parametrize(
    ("lengths", "is_native"),
    [
        pytest.param([(1, 2, 300), (1, 0, 19), (3, 1, 500), (1, 5, 512), (60, 3, 7)], True, id="a source each"),
        pytest.param([(1, 2, 300), (1, 2, 300), (4, 1, 500)], False, id="one for two"),
    ],
)
def test_sources_are_attended_to_as_by_the_twin(
    lengths: list[tuple[int, int, int]],
    is_native: bool,
    num_heads: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
) -> None:
    inputs, cross, own, _ = crossing(LayerShape(num_kv_heads, key_dim, value_dim, dtype), lengths)
    num_tokens = inputs.input_ids.shape[1]
    torch.manual_seed(1)
    call = AttentionCall(0.2, None, None, None)
    for _ in range(LAYERS):
        query = torch.randn(1, num_tokens, num_heads, key_dim).to(dtype).transpose(1, 2)
        expected = attend_sources(cross, query, call)
        cross.num_calls -= 1
        with native_attention(native_kernels(), FlatStep(inputs, own, cross)):
            assert (cross.native is not None) == is_native
            got = attend_sources(cross, query, call)
        assert cross.native is None
        tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_sources_of_another_step_are_refused() -> None:
    inputs, cross, own, _ = crossing(LayerShape(1, 32, 16, torch.bfloat16), [(1, 0, 20), (1, 1, 20)])
    with native_attention(native_kernels(), FlatStep(inputs, own, cross)):
        native = cross.native
        assert native is not None
        for num_tokens, layer in ((1, 0), (2, LAYERS)):
            with pytest.raises(RuntimeError, match="not of this step"):
                native(torch.zeros(1, 1, num_tokens, 32).bfloat16(), 1, 16, layer, 1.0)
