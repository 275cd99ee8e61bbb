"""Attention over a flat batch: the function that the flat lane registers with transformers.

Knows nothing of scheduling or models; sees one layer's Q, K and V and the step's layout.
Called by transformers' attention modules inside a forward that model/runner.py runs under `flat_step`.

All tokens of a step lie in one row [1, H, T, D]. Their K and V go to their slots; then the single-token rows of each
arena are attended to together and every longer run by itself. The query heads that share a KV head are packed as extra
query rows (decode) or get the KV head with a stride of 0 (chunks): K and V are never repeated in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from engine.kv.slots import Arena, LayerShape
from engine.model.cross_attention import CrossStep, attend_cross
from engine.model.inputs import Chunk, DecodeGroup, FlatInputs
from engine.model.native_step import can_attend
from engine.model.paged_step import PagedStep
from engine.model.relative_bias import bias_table, is_relative
from engine.model.slot_rows import SlotRows
from engine.model.step import FlatStep, Recording, current_step

NAME = "flat_slots"  # what config._attn_implementation holds while the flat lane drives the model

BLOCK_QUERIES = 128  # queries whose scores are computed at once; 64 to 256 were alike for most shapes
MIN_BLOCK = 32  # below it the fused kernel is as fast

# What a model hands to attention beyond these may change its result, and is refused: the model is not for this lane.
_HARMLESS = frozenset({
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
    "is_causal", "output_router_logits", "logits_to_keep", "layer_idx", "past_key_values", "position_embeddings",
    "seq_idx", "token_type_ids", "inputs_embeds", "input_ids",
})  # fmt: skip


class NotFlat(Exception):
    """This model's attention asks for something that the flat lane cannot give exactly."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one attention call asked for beside Q, K and V."""

    scaling: float
    window: int | None  # keys further back than this are not seen; the query itself counts
    softcap: float | None
    sinks: torch.Tensor | None  # [H]
    bias: torch.Tensor | None = None  # [H, N] by distance, added to the scores


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over the step's tokens and everything their sequences computed before.

    Args:
        module: the model's attention module; only its `is_causal` is read.
        query: [1, H, T, Dk]; key: [1, Hkv, T, Dk]; value: [1, Hkv, T, Dv], positions already encoded.
        attention_mask: must be None: no mask function is registered under our name.
        scaling: factor on the scores; None for Dk ** -0.5.
        sliding_window: keys seen, the query's own included; None for all.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [H] sink logits, a column of the softmax that has no value.
        position_bias: T5's, made for a batch whose rows stand at one position; tells that there is one, no more.

    Returns:
        [1, T, H, Dv] and None (no weights). The storage of the step gains this layer's K and V.

    Raises:
        NotFlat: the model asks for what this lane cannot honour.
    """
    step = current_step()
    if step is None:
        raise NotFlat("attention was called outside a step")
    call = AttentionCall(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    if isinstance(step, FlatStep) and step.cross is not None and key is step.cross.marker:
        return attend_sources(step.cross, query, call), None
    _refuse_unknown(module, attention_mask, key, kwargs)
    if isinstance(step, Recording):
        step.shapes.append(LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device))
        step.windows.append(sliding_window)
        return _whole(query, key, value, call), None
    if isinstance(step, PagedStep):
        if position_bias is not None:
            raise NotFlat("attention is given a position bias, which paged KV does not serve")
        return step.attend(query, key, value, call), None
    if position_bias is not None:
        call = replace(call, bias=_bias(step, module, query.device))
        if call.window is not None or softcap is not None or s_aux is not None:
            raise NotFlat("attention is given a position bias together with a window, a softcap or sinks")
    if step.windows is not None:
        step.windows.append(sliding_window)
    layer = step.num_calls
    step.num_calls += 1
    if step.kernels is not None and call.bias is None and can_attend(query, key, value):
        return step.kernels.attend_slots(query, key, value, s_aux, layer, call.scaling, call.window, call.softcap), None
    return attend_flat(step.inputs.on(query.device), layer, query, key, value, call), None


def attend_flat(
    inputs: FlatInputs, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> torch.Tensor:
    """One layer's attention of a step's tokens, [1, H, T, D] each: [1, T, H, Dv]; their slots gain their K and V."""
    if inputs.captured is not None:
        return _attend_captured(inputs.captured, layer, query[0], key[0], value[0], call)
    if len(inputs.groups) == 1 and not inputs.chunks:
        return _attend_group(inputs.groups[0], layer, query[0], key[0], value[0], call)
    output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
    for group in inputs.groups:
        part = slice(group.first, group.last)
        output[:, part] = _attend_group(group, layer, query[0, :, part], key[0, :, part], value[0, :, part], call)
    for chunk in inputs.chunks:
        part = slice(chunk.first, chunk.last)
        output[0, part] = _attend_chunk(chunk, layer, query[0, :, part], key[0, :, part], value[0, :, part], call)
    return output


def attend_sources(cross: CrossStep, query: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """One layer's cross-attention of a step's tokens, [1, H, T, Dk]: [1, T, H, Dv]."""
    is_plain = call.softcap is None and call.sinks is None
    return attend_cross(
        cross, query, call.scaling, lambda q, k, v, mask: attend(q, k, v, mask, call), is_plain=is_plain
    )


def _bias(step: FlatStep, module: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """The table of this layer, or of the layer before it that has one: T5's layers share the first one's."""
    if is_relative(module):
        if id(module) not in step.biases:
            step.biases[id(module)] = bias_table(module)
        step.bias = step.biases[id(module)]
    bias = step.bias_on(device)
    if bias is None:
        raise NotFlat("attention is given a position bias that no layer learns")
    return bias


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, call: AttentionCall
) -> torch.Tensor:
    """Attention of [B, H, Tq, Dk] over [B, H, L, Dk] and [B, H, L, Dv]; the mask is bool, true where a key is seen.

    Softcap and sinks have no fused kernel here; the plain form below serves them. Both are float32 inside. A mask may
    also be one that is added, of the query's dtype.
    """
    if call.softcap is None and call.sinks is None:
        if query.shape[2] == 1 and query.device.type == "cpu" and _is_single_faster(query, key):
            return attend_single(query, key, value, mask, call.scaling)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scaling)
    return attend_plain(query, key, value, mask, call)


def attend_single(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention of one query row a KV head, [B, H, 1, D], by plain products: decoding without grouped heads.

    The fused kernel does not use the processor's bfloat16 products for a single row. 8 rows of 12 heads over 1,500
    keys, one thread: 3 ms instead of 70; over 64 keys 0.5 instead of 1.4.
    """
    # Flat views: a slot's heads and the slots themselves lie at even distances.
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    rows = query.flatten(0, 1)
    scores = torch.baddbmm(rows.new_empty(()), rows, keys.transpose(1, 2), beta=0.0, alpha=scaling)
    shaped = scores.view(*query.shape[:3], -1)
    if mask is not None and mask.dtype is torch.bool:
        shaped.masked_fill_(mask.logical_not(), torch.finfo(scores.dtype).min)
    elif mask is not None:
        shaped.add_(mask)
    return torch.bmm(torch.softmax(scores, dim=-1), values).view(*query.shape[:3], -1)


def _is_single_faster(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether attend_single is for a row on the CPU: in bfloat16 always, in float32 where slots are full to their end.

    Sources of speech always are: 8 rows of 12 heads over 1,500 keys, one thread, 4.1 ms instead of 4.8; 16 over 64 keys
    0.4 instead of 0.8. Of longer slots the fused kernel reads a part as fast or a little faster.
    """
    return query.dtype is torch.bfloat16 or (query.dtype is torch.float32 and key.is_contiguous())


def attend_plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, call: AttentionCall
) -> torch.Tensor:
    """The plain twin of `attend`, step by step as transformers' eager attention does; sinks are [.., H, .., 1]."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if call.sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        sinks = call.sinks.expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sinks.to(scores.dtype)], dim=-1), dim=-1, dtype=torch.float32)
        weights = weights[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)


def attend_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, call: AttentionCall
) -> torch.Tensor:
    """Attention of [Hkv, G, Tq, Dk] over [Hkv, L, Dk] and [Hkv, L, Dv], the heads of a group packed as rows.

    The mask is bool [Tq, M], true where one of the last M keys is seen; all keys before them are. Returns
    [Hkv, G, Tq, Dv].
    """
    num_kv_heads, num_groups, num_queries, _ = query.shape
    length = key.shape[1]
    rows = query.reshape(num_kv_heads, num_groups * num_queries, -1)
    # alpha, not a product of its own: the scores are rounded to their dtype once, after scaling.
    scores = torch.baddbmm(rows.new_empty(()), rows, key.transpose(1, 2), beta=0.0, alpha=call.scaling)
    scores = scores.view(num_kv_heads, num_groups, num_queries, length)
    if call.softcap is not None:
        scores = scores.div_(call.softcap).tanh_().mul_(call.softcap)
    scores[..., length - mask.shape[1] :].masked_fill_(mask.logical_not(), torch.finfo(scores.dtype).min)
    if call.sinks is None:
        weights = torch.softmax(scores, dim=-1)  # float32 inside, whatever the dtype
    else:
        sinks = call.sinks.to(scores.dtype).expand(num_kv_heads, num_groups, num_queries, 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    out = torch.bmm(weights.reshape(num_kv_heads, num_groups * num_queries, length), value)
    return out.view(num_kv_heads, num_groups, num_queries, -1)


def _refuse_unknown(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, key: torch.Tensor, kwargs: dict[str, Any]
) -> None:
    if attention_mask is not None:
        raise NotFlat("the model makes an attention mask of its own")
    if key.shape[0] != 1:
        raise NotFlat(f"keys arrived with a batch of {key.shape[0]}, not flat")
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in _HARMLESS:
            raise NotFlat(f"attention is given {name!r}, which this lane does not know")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise NotFlat("attention is not causal")


def _attend_group(
    group: DecodeGroup,
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    call: AttentionCall,
) -> torch.Tensor:
    """Single-token rows of one arena: query [H, B, Dk], keys and values [Hkv, B, D] -> [1, B, H, Dv]."""
    cached_keys, cached_values = group.arena.keys[layer], group.arena.values[layer]  # [S, Hkv, C, D]
    num_kv_heads, num_rows, _ = keys.shape
    rows = group.rows_to_write(num_kv_heads)
    cached_keys.view(-1, keys.shape[2]).index_copy_(0, rows, keys.transpose(0, 1).reshape(-1, keys.shape[2]))
    cached_values.view(-1, values.shape[2]).index_copy_(0, rows, values.transpose(0, 1).reshape(-1, values.shape[2]))
    # [B, Hkv, G, Dk]: the heads that share a KV head are query rows of it
    packed = query.transpose(0, 1).reshape(num_rows, num_kv_heads, -1, query.shape[2])
    if call.sinks is not None:
        call = replace(call, sinks=call.sinks.view(1, num_kv_heads, -1, 1))
    if group.is_padded:
        length = group.max_length
        if group.rows is not None:
            whole = packed.new_zeros((group.num_slots, *packed.shape[1:]))
            whole[group.rows] = packed
            packed = whole
        seen_keys = cached_keys[: group.num_slots, :, :length]
        seen_values = cached_values[: group.num_slots, :, :length]
        mask = group.mask(call.window) if call.bias is None else group.bias_mask(call.bias, packed.shape[1])
        out = attend(packed, seen_keys, seen_values, mask, call)
        if group.rows is not None:
            out = out[group.rows]
    else:
        parts = []
        for row, (slot, length) in enumerate(zip(group.slots, group.lengths, strict=True)):
            start = 0 if call.window is None else max(0, length - call.window)
            row_keys, row_values = cached_keys[slot, None, :, start:length], cached_values[slot, None, :, start:length]
            bias = None if call.bias is None else group.bias_mask(call.bias, packed.shape[1])[slot, None, ..., :length]
            parts.append(attend(packed[row : row + 1], row_keys, row_values, bias, call))
        out = torch.cat(parts)
    return out.reshape(1, num_rows, -1, values.shape[2])


def _attend_captured(
    rows: SlotRows, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: AttentionCall
) -> torch.Tensor:
    """As _attend_group, for rows whose slots and lengths only the device knows."""
    rows.write(layer, keys.transpose(0, 1), values.transpose(0, 1))
    if call.sinks is not None:
        call = replace(call, sinks=call.sinks.view(1, keys.shape[0], -1, 1))
    heads = query.transpose(0, 1)  # [B, H, Dk]
    return rows.attend(layer, heads, lambda q, k, v, mask: attend(q, k, v, mask, call), call.window, call.bias)[None]


def _attend_chunk(
    chunk: Chunk, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: AttentionCall
) -> torch.Tensor:
    """A run of one sequence's tokens: query [H, Tq, Dk], keys and values [Hkv, Tq, D] -> [Tq, H, Dv]."""
    cached_keys, cached_values = chunk.arena.keys[layer][chunk.slot], chunk.arena.values[layer][chunk.slot]
    cached_keys[:, chunk.start : chunk.length] = keys
    cached_values[:, chunk.start : chunk.length] = values
    return causal(query, cached_keys[:, : chunk.length], cached_values[:, : chunk.length], chunk, call)


def causal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: Chunk, call: AttentionCall
) -> torch.Tensor:
    """[H, Tq, Dk] over [Hkv, L, Dk] and [Hkv, L, Dv] -> [Tq, H, Dv]."""
    num_kv_heads, num_queries = keys.shape[0], query.shape[1]
    num_groups = query.shape[0] // num_kv_heads
    # KV heads are the batch here and their query heads the heads, so that K and V serve all of them with a stride of 0.
    heads = query.view(num_kv_heads, num_groups, num_queries, -1)  # [Hkv, G, Tq, Dk]
    if call.sinks is not None:
        call = replace(call, sinks=call.sinks.view(num_kv_heads, num_groups, 1, 1))
    if _is_blockwise(query, call):
        parts = []
        for first in range(0, num_queries, BLOCK_QUERIES):
            last = min(first + BLOCK_QUERIES, num_queries)
            seen = slice(chunk.first_key(call.window, first), chunk.start + last)
            # Without a window only the block's own keys can lie in the future of some of its queries.
            seen_mask = chunk.within(last - first) if call.window is None else chunk.mask(call.window, first, last)
            parts.append(attend_packed(heads[:, :, first:last], keys[:, seen], values[:, seen], seen_mask, call))
        out = torch.cat(parts, dim=2)
    else:
        # From position 0 on, and inside the window, the kernel's own causal form does and skips what it can.
        is_causal = chunk.start == 0 and call.bias is None and (call.window is None or num_queries <= call.window)
        mask = None if is_causal else chunk.mask(call.window, 0, num_queries)
        if call.bias is not None:
            mask = chunk.bias_mask(call.bias, num_kv_heads)
        first_key = chunk.first_key(call.window, 0)
        key = keys[:, None, first_key:].expand(-1, num_groups, -1, -1)
        value = values[:, None, first_key:].expand(-1, num_groups, -1, -1)
        out = F.scaled_dot_product_attention(heads, key, value, attn_mask=mask, is_causal=is_causal, scale=call.scaling)
    return out.flatten(0, 1).transpose(0, 1)


def _is_blockwise(query: torch.Tensor, call: AttentionCall) -> bool:
    """Whether plain products over blocks of queries serve a chunk, instead of the fused kernel.

    They must where the kernel knows no softcap or sinks. In half precision on the CPU they are also faster: scores of
    a block stay in the cache, and what lies after it is not computed. 512 queries over 1,536 keys, bfloat16, one
    thread: 9 heads on 3 of 64: 10 ms instead of 28; 32 on 8 of 128: 53 instead of 196.
    """
    if call.bias is not None:
        return False
    if call.softcap is not None or call.sinks is not None:
        return True
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16) and query.shape[1] >= MIN_BLOCK


def _whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """One sequence from its first token on, with no storage: what a probing forward computes."""
    chunk = Chunk(Arena(), slot=0, first=0, last=query.shape[2], start=0, device=query.device)
    return causal(query[0], key[0], value[0], chunk, call)[None]
