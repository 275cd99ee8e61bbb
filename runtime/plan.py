"""What would fit: weights, KV and activations against free memory, all in bytes; the arithmetic of a start.

Knows nothing of files, models or torch; numbers come in, numbers go out.
Called by planning.py; read by plan_text.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.kv.pool import size_classes

if TYPE_CHECKING:
    from engine.model.blueprint import Widths
    from engine.model.kv_cost import KVCost

SHOWN_LENGTHS = (512, 2048)
"""Tokens of the sequences whose memory is shown, beside the longest one."""

_BLOCK_QUERIES = 128  # whose attention scores exist at once


@dataclass(frozen=True, slots=True)
class Demand:
    """What the options ask of a machine.

    Args:
        resident_bytes: of everything that stays: weights, buffers, packed copies.
        loading_bytes: most bytes of weights at once while they are loaded.
        scratch_bytes: that a step may need beside activations, for int4 weights.
        widths: what activations grow with.
        num_step_tokens: computed in one step; a model that takes a prompt whole computes longer ones too.
        kv: what a sequence takes; None where that cannot be told without weights.
        kv_cache_memory: bytes that the operator allows for KV; None for what is left.
        kv_share: of what is left after the weights, for KV, where nothing else is said.
        max_num_seqs: sequences in one step.
        max_model_len: tokens of the longest sequence.
        max_source_len: positions of an encoder's longest output; None without an encoder.
        is_source_fixed: whether every source has that many: windows of speech, static slots.
        is_static: whether each sequence of a step has a slot of the full length from the start.
        smallest_slot: tokens of the smallest slot; sizes double from there.
    """

    resident_bytes: int
    loading_bytes: int
    scratch_bytes: int
    widths: Widths
    num_step_tokens: int
    kv: KVCost | None
    kv_cache_memory: int | None
    kv_share: float
    max_num_seqs: int
    max_model_len: int
    max_source_len: int | None
    is_source_fixed: bool
    is_static: bool
    smallest_slot: int

    def num_source_positions(self, num_tokens: int) -> int:
        """Of the source that a sequence of `num_tokens` is shown with: as many, where sources differ."""
        if self.max_source_len is None:
            return 0
        return self.max_source_len if self.is_source_fixed else min(num_tokens, self.max_source_len)


@dataclass(frozen=True, slots=True)
class LengthPlan:
    """Sequences of one length.

    Args:
        num_tokens: prompt and output together; of an encoder-decoder, output.
        num_source_positions: of the source each reads; 0 without an encoder.
        used_bytes: that one sequence fills.
        held_bytes: that one sequence keeps from others: its slot.
        batch_bytes: held by a full step of them, within the budget.
        activation_bytes: of a step, estimated.
        peak_bytes: resident, the batch's and these.
        num_fitting: how many the budget holds at once; may be more than a step takes.
    """

    num_tokens: int
    num_source_positions: int
    used_bytes: int
    held_bytes: int
    batch_bytes: int
    activation_bytes: int
    peak_bytes: int
    num_fitting: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What would happen.

    Args:
        left_bytes: free memory after the weights; negative where they do not fit.
        kv_budget_bytes: most bytes of KV.
        longest: tokens of the longest sequence that fits alone; 0 for none.
        longest_source: positions of the longest source that does; None without an encoder.
        lengths: one entry a length, rising.
        problems: why the server would not start or serve; empty when it would.
        warnings: what would be less than asked.
    """

    left_bytes: int
    kv_budget_bytes: int
    longest: int
    longest_source: int | None
    lengths: tuple[LengthPlan, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the server would start and serve."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Store:
    """One kind of KV memory: decoder tokens or encoder positions.

    Args:
        bytes_per_position: of each.
        budget_positions: that there may be of it.
        longest: positions of a sequence that it can hold.
    """

    bytes_per_position: int
    budget_positions: int
    longest: int


def make_plan(demand: Demand, free_bytes: int) -> Plan:
    """Hold a demand against the memory that is free."""
    left = free_bytes - demand.resident_bytes
    budget = demand.kv_cache_memory
    if budget is None:
        budget = int(max(0, left) * demand.kv_share)
    longest, longest_source = 0, None
    lengths: tuple[LengthPlan, ...] = ()
    if demand.kv is not None:
        stores = _stores(demand, demand.kv, budget)
        longest = stores[0].longest
        longest_source = stores[1].longest if len(stores) > 1 else None
        shown = {n for n in SHOWN_LENGTHS if n < demand.max_model_len and not demand.is_static}
        lengths = tuple(
            _at_length(demand, demand.kv, stores, budget, num_tokens)
            for num_tokens in sorted({*shown, demand.max_model_len})
        )
    problems = _problems(demand, free_bytes, budget, longest, longest_source, lengths)
    warnings = () if problems else _warnings(demand, left - budget, longest, longest_source)
    return Plan(left, budget, longest, longest_source, lengths, problems, warnings)


def estimate_activations(demand: Demand, num_tokens: int) -> int:
    """Bytes that a step holds beside weights and KV when its longest sequence has `num_tokens`; roughly.

    The residual stream and its copies, the widest layer's inputs and outputs, attention scores of a block of queries,
    and logits in the model's dtype and twice in float32 for the sampler.
    """
    widths = demand.widths
    num_keys = max(num_tokens, demand.num_source_positions(num_tokens))
    is_chunked = demand.kv is not None and demand.kv.lane == "flat"
    num_computed = demand.num_step_tokens if is_chunked else max(demand.num_step_tokens, num_keys)
    stream = num_computed * (4 * widths.hidden + 3 * widths.widest) * widths.itemsize
    scores = widths.num_heads * min(num_computed, _BLOCK_QUERIES) * num_keys * widths.itemsize
    logits = demand.max_num_seqs * widths.vocab_size * (widths.itemsize + 2 * 4)
    return stream + scores + logits + demand.scratch_bytes


def _stores(demand: Demand, kv: KVCost, budget: int) -> list[_Store]:
    """The decoder's store, and the encoder's where there is one, each with its share of the budget."""
    wanted = [(kv.bytes_per_token, demand.max_model_len)]
    if demand.max_source_len is not None:
        wanted.append((kv.bytes_per_source_position, demand.max_source_len))
    if demand.is_static:
        return [_Store(size, longest * demand.max_num_seqs, longest) for size, longest in wanted]
    if kv.lane == "solo":  # which has one account for everything
        left = max(0, budget - kv.bytes_fixed)
        positions = [left // size if size else longest for size, longest in wanted]
    else:
        total = sum(size * longest for size, longest in wanted)
        positions = [budget * (size * longest) // total // size for size, longest in wanted]
    return [_Store(size, n, min(longest, n)) for (size, longest), n in zip(wanted, positions, strict=True)]


def _at_length(demand: Demand, kv: KVCost, stores: list[_Store], budget: int, num_tokens: int) -> LengthPlan:
    num_source = demand.num_source_positions(num_tokens)
    positions = [num_tokens, num_source][: len(stores)]
    slots = [_slot(demand, kv, store, n) for store, n in zip(stores, positions, strict=True)]
    used = kv.bytes_fixed + sum(store.bytes_per_position * n for store, n in zip(stores, positions, strict=True))
    held = kv.bytes_fixed + sum(store.bytes_per_position * n for store, n in zip(stores, slots, strict=True))
    batch = held * demand.max_num_seqs
    if demand.is_static or not held:
        num_fitting = demand.max_num_seqs if batch <= budget else 0
    elif any(n > store.longest for store, n in zip(stores, positions, strict=True)):
        num_fitting = 0
    elif kv.lane == "solo":
        num_fitting = budget // held
    else:
        num_fitting = min(store.budget_positions // n for store, n in zip(stores, slots, strict=True))
    if not demand.is_static:
        batch = min(batch, budget)
    activations = estimate_activations(demand, min(num_tokens, stores[0].longest))
    return LengthPlan(
        num_tokens=num_tokens,
        num_source_positions=num_source,
        used_bytes=used,
        held_bytes=held,
        batch_bytes=batch,
        activation_bytes=activations,
        peak_bytes=demand.resident_bytes + batch + activations,
        num_fitting=num_fitting,
    )


def _slot(demand: Demand, kv: KVCost, store: _Store, num_positions: int) -> int:
    """Positions of the slot that `num_positions` get; solo sequences have no slots and take what they use."""
    if demand.is_static or kv.lane == "solo" or num_positions > store.longest:
        return num_positions
    capacities = size_classes(min(demand.smallest_slot, store.longest), store.longest)
    return next(capacity for capacity in capacities if capacity >= num_positions)


def _problems(
    demand: Demand,
    free_bytes: int,
    budget: int,
    longest: int,
    longest_source: int | None,
    lengths: tuple[LengthPlan, ...],
) -> tuple[str, ...]:
    left = free_bytes - demand.resident_bytes
    if left < 0:
        return (f"the weights need {-left} bytes more than are free",)
    if demand.loading_bytes > free_bytes:
        return (f"loading needs {demand.loading_bytes} bytes for a while, and {free_bytes} are free",)
    if demand.kv_cache_memory is not None and demand.kv_cache_memory > left:
        return (f"--kv-cache-memory {budget}: {left} bytes are left after the weights",)
    if demand.is_static and lengths and lengths[-1].batch_bytes > budget:
        return (f"--static-cache True: {lengths[-1].batch_bytes} bytes of slots, and {budget} are free for it",)
    if demand.kv is not None and longest < 1:
        return (f"not one token of KV fits into {budget} bytes",)
    if longest_source is not None and longest_source < _shortest_source(demand):
        return (f"no source has room within {budget} bytes of KV",)
    return ()


def _shortest_source(demand: Demand) -> int:
    return demand.max_source_len or 1 if demand.is_source_fixed else 1


def _warnings(demand: Demand, rest: int, longest: int, longest_source: int | None) -> tuple[str, ...]:
    warnings = []
    if demand.kv is not None and longest < demand.max_model_len:
        warnings.append(
            f"a sequence of {demand.max_model_len} tokens does not fit: longer ones than {longest} are refused"
        )
    if longest_source is not None and demand.max_source_len is not None and longest_source < demand.max_source_len:
        warnings.append(
            f"a source of {demand.max_source_len} positions does not fit: longer ones than {longest_source} are refused"
        )
    activations = estimate_activations(demand, longest)
    if activations > rest:
        warnings.append(
            f"{rest} bytes are left for activations, which may need {activations}: "
            "a smaller --kv-cache-memory or --max-batch-tokens leaves more"
        )
    return tuple(warnings)
