"""Fast attention over slots agrees with its plain twin, whatever the layout of the step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.batch import Batch, ScheduledSequence
from engine.kv.pool import ResizeArena, Slot
from engine.kv.slots import Arena, LayerShape, SlotStorage
from engine.model.attention import (
    AttentionCall,
    NotFlat,
    attend,
    attend_plain,
    causal,
    flat_attention,
)
from engine.model.inputs import Chunk, build_inputs
from engine.model.step import FlatStep, flat_step
from engine.sequence import SamplingParams, Sequence

HEADS, KV_HEADS, DIM, VALUE_DIM = 6, 2, 8, 12
DEVICE = torch.device("cpu")


def _expected(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence's attention in float64, head by head and query by query: [T, H, Dv]."""
    length = key.shape[0]
    out = torch.zeros(length, HEADS, VALUE_DIM, dtype=torch.float64)
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        for position in range(length):
            first = 0 if window is None else max(0, position - window + 1)
            scores = key[first : position + 1, kv_head].double() @ query[position, head].double() * DIM**-0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            weights = scores.softmax(0)[: position + 1 - first]
            out[position, head] = weights @ value[first : position + 1, kv_head].double()
    return out


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 0, 5)])  # dense: one padded call; scattered: row by row
def test_any_schedule_of_a_batch_gives_plain_attention(
    window: int | None, softcap: float | None, has_sinks: bool, slots: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    lengths = (11, 9, 10)
    tensors = [
        (torch.randn(n, HEADS, DIM), torch.randn(n, KV_HEADS, DIM), torch.randn(n, KV_HEADS, VALUE_DIM))
        for n in lengths
    ]
    sinks = torch.randn(HEADS) if has_sinks else None
    expected = [_expected(*entry, window, softcap, sinks) for entry in tensors]
    storage = SlotStorage([LayerShape(KV_HEADS, DIM, VALUE_DIM, torch.float32)], DEVICE)
    storage.apply([ResizeArena(16, (), 6)])
    sequences = [Sequence(n, [1] * lengths[n], SamplingParams(max_tokens=1), 0.0) for n in range(3)]
    # (sequence, start, tokens): whole prompts, cut prompts beside single tokens, single tokens together
    for step in (
        [(0, 0, 5), (1, 0, 3)],
        [(0, 5, 1), (1, 3, 4), (2, 0, 8)],
        [(0, 6, 1), (1, 7, 1), (2, 8, 1)],
        [(0, 7, 3)],
        [(2, 9, 1), (0, 10, 1)],
    ):
        batch = Batch(tuple(ScheduledSequence(sequences[n], start, count, count) for n, start, count in step))
        inputs = build_inputs(batch, lambda s: Slot(16, slots[s.sequence_id]), storage, DEVICE)
        parts = [
            tuple(tensor[item.start : item.start + item.num_tokens] for tensor in tensors[item.sequence.sequence_id])
            for item in inputs.items
        ]
        query, key, value = (torch.cat([part[i] for part in parts]).transpose(0, 1)[None] for i in range(3))
        with flat_step(FlatStep(inputs, storage)):
            out, _ = flat_attention(
                torch.nn.Module(), query, key, value, None, sliding_window=window, softcap=softcap, s_aux=sinks
            )
        wanted = torch.cat([expected[i.sequence.sequence_id][i.start : i.start + i.num_tokens] for i in inputs.items])
        torch.testing.assert_close(out[0].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_agrees_with_its_plain_twin(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(3, 2, n, 16).to(dtype) for n in (3, 20, 20))
    mask = torch.arange(20)[None] < torch.tensor([20, 7, 13])[:, None]
    call = AttentionCall(0.25, None, None, None)
    fused = attend(query, key, value, mask[:, None, None], call)
    plain = attend_plain(query, key, value, mask[:, None, None], call)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(fused, plain, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("start", [0, 70])
@pytest.mark.parametrize("has_extras", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_queries_agree_with_the_plain_twin_over_the_whole(
    window: int | None, start: int, has_extras: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    num_queries, length = 300, start + 300  # blocks of 128, 128 and 44
    query = torch.randn(HEADS, num_queries, DIM).to(dtype)
    keys, values = torch.randn(KV_HEADS, length, DIM).to(dtype), torch.randn(KV_HEADS, length, VALUE_DIM).to(dtype)
    sinks = torch.randn(HEADS) if has_extras else None
    call = AttentionCall(0.3, window, 1.5 if has_extras else None, sinks)
    chunk = Chunk(Arena(), slot=0, first=0, last=num_queries, start=start, device=DEVICE)
    got = causal(query, keys, values, chunk, call)
    positions = torch.arange(length)
    mask = positions[None] <= positions[start:, None]
    if window is not None:
        mask &= positions[None] > positions[start:, None] - window
    groups = HEADS // KV_HEADS
    plain = attend_plain(
        query[None].float(),
        keys.repeat_interleave(groups, 0)[None].float(),
        values.repeat_interleave(groups, 0)[None].float(),
        mask,
        replace(call, sinks=None if sinks is None else sinks.view(1, HEADS, 1, 1)),
    )
    tolerance = 1e-5 if dtype is torch.float32 else 4e-2
    torch.testing.assert_close(got.float(), plain[0].transpose(0, 1), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize(("dtype", "capacity"), [(torch.bfloat16, 32), (torch.float32, 32), (torch.float32, 21)])
def test_a_single_row_by_plain_products_agrees_with_the_twin(kind: str, dtype: torch.dtype, capacity: int) -> None:
    torch.manual_seed(0)
    num_slots, length = 3, 21
    query = torch.randn(num_slots, HEADS, 1, DIM).to(dtype)
    # Views of longer slots, as in an arena, or of full ones.
    key = torch.randn(num_slots + 1, HEADS, capacity, DIM).to(dtype)[:num_slots, :, :length]
    value = torch.randn(num_slots + 1, HEADS, capacity, VALUE_DIM).to(dtype)[:num_slots, :, :length]
    seen = torch.arange(length) < torch.tensor([21, 4, 13])[:, None]
    mask = {"none": None, "bool": seen[:, None, None], "added": None}[kind]
    call = AttentionCall(0.3, None, None, None)
    if kind == "added":
        bias = torch.randn(num_slots, HEADS, 1, length).masked_fill(~seen[:, None, None], float("-inf"))
        got = attend(query, key, value, bias.to(dtype), call)
        scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * 0.3 + bias
        wanted = torch.matmul(torch.softmax(scores, -1), value.float())
    else:
        got = attend(query, key, value, mask, call)
        wanted = attend_plain(query.float(), key.float(), value.float(), mask, call)
    tolerance = 4e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.float(), wanted, atol=tolerance, rtol=tolerance)


def test_what_the_lane_cannot_honour_is_refused() -> None:
    tensor = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotFlat, match="outside a step"):
        flat_attention(torch.nn.Module(), tensor, tensor, tensor, None)
    storage = SlotStorage([LayerShape(2, 4, 4, torch.float32)], DEVICE)
    inputs = build_inputs(Batch(()), lambda _s: Slot(16, 0), storage, DEVICE)
    with flat_step(FlatStep(inputs, storage)):
        with pytest.raises(NotFlat, match="mask of its own"):
            flat_attention(torch.nn.Module(), tensor, tensor, tensor, torch.zeros(1))
        with pytest.raises(NotFlat, match="a position bias that no layer"):
            flat_attention(torch.nn.Module(), tensor, tensor, tensor, None, position_bias=tensor)
        with pytest.raises(NotFlat, match="not causal"):
            flat_attention(torch.nn.Module(), tensor, tensor, tensor, None, is_causal=False)
