"""The native attention gives what its twin gives, and leaves the same K and V behind."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.kv.pool import ResizeArena, Slot
from engine.kv.slots import LayerShape, SlotStorage
from engine.model.attention import AttentionCall, attend_flat
from engine.model.inputs import FlatInputs, build_inputs
from engine.model.native_step import can_attend, native_step
from engine.scheduler import Batch, ScheduledSequence
from engine.sequence import SamplingParams, Sequence
from tests.int4_weights import CAN_COMPILE, native_kernels

pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")

CPU = torch.device("cpu")
LENGTHS = {0: (8, 1), 1: (64, 33), 2: (64, 64), 3: (8, 8), 4: (64, 5)}  # of a row: its slot's capacity, and its keys
LAYERS = 2


def step_of(shape: LayerShape) -> tuple[SlotStorage, FlatInputs]:
    """A step of five single tokens in two arenas full of random K and V."""
    storage = SlotStorage([shape] * LAYERS, CPU)
    storage.apply([ResizeArena(8, (), 5), ResizeArena(64, (), 5)])
    generator = torch.Generator().manual_seed(0)
    for arena in storage.arenas.values():
        for tensor in (*arena.keys, *arena.values):
            tensor.normal_(generator=generator)
    return storage, inputs_over(storage)


def inputs_over(storage: SlotStorage) -> FlatInputs:
    items = tuple(
        ScheduledSequence(Sequence(n, [1] * length, SamplingParams(max_tokens=1), arrival_time_s=0.0), length - 1, 1, 1)
        for n, (_, length) in LENGTHS.items()
    )
    return build_inputs(Batch(items), lambda s: Slot(LENGTHS[s.sequence_id][0], s.sequence_id), storage, CPU)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "key_dim", "value_dim", "dtype"),
    [
        pytest.param(9, 3, 64, 64, torch.bfloat16, id="GQA"),
        pytest.param(4, 4, 32, 16, torch.bfloat16, id="small"),
        pytest.param(10, 2, 192, 128, torch.bfloat16, id="unlike sizes"),
        pytest.param(6, 1, 16, 48, torch.float32, id="float32"),
    ],
)
def test_rows_of_any_length_are_attended_to_as_by_the_twin(
    num_heads: int, num_kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, num_threads: int
) -> None:
    storage, inputs = step_of(LayerShape(num_kv_heads, key_dim, value_dim, dtype))
    twin = copy.deepcopy(storage)
    generator = torch.Generator().manual_seed(1)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for layer, (window, softcap, has_sinks) in enumerate([(None, None, False), (5, 2.0, True)]):
            # [B, H, D] in memory, as a projection leaves them.
            query, key, value = (
                torch.randn(1, 5, heads, dim, generator=generator).to(dtype).transpose(1, 2)
                for heads, dim in ((num_heads, key_dim), (num_kv_heads, key_dim), (num_kv_heads, value_dim))
            )
            assert can_attend(query, key, value)
            sinks = torch.randn(num_heads, generator=generator).to(dtype) if has_sinks else None
            call = AttentionCall(key_dim**-0.5, window, softcap, sinks)
            kernels = native_kernels()
            with native_step(kernels, inputs):
                got = kernels.attend_slots(query, key, value, sinks, layer, call.scaling, window, softcap)
            expected = attend_flat(inputs_over(twin), layer, query, key, value, call)
            tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
            for capacity, arena in storage.arenas.items():
                assert torch.equal(arena.keys[layer], twin.arenas[capacity].keys[layer])
                assert torch.equal(arena.values[layer], twin.arenas[capacity].values[layer])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_row_of_nan_is_noticed_and_its_neighbours_are_not(softcap: float | None) -> None:
    _, inputs = step_of(LayerShape(2, 32, 16, torch.bfloat16))
    query, key, value = (torch.ones(1, heads, 5, dim).bfloat16() for heads, dim in ((4, 32), (2, 32), (2, 16)))
    query[:, :, 2] = float("nan")
    with native_step(native_kernels(), inputs):
        got = native_kernels().attend_slots(query, key, value, None, 0, 1.0, None, softcap)
    assert got.isnan().flatten(2).all(2).tolist() == [[row == 2 for row in range(5)]]
    assert got.isnan().flatten(2).any(2).tolist() == [[row == 2 for row in range(5)]]


def test_outside_of_its_step_it_refuses() -> None:
    _, inputs = step_of(LayerShape(1, 32, 16, torch.bfloat16))
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
