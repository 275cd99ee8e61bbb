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
        scratch_bytes: that a step may need beside activations: an int4 layer, unpacked.
        widths: what activations grow with.
        num_step_tokens: computed in one step; a model that takes a prompt whole computes longer ones too.
        kv: what a sequence takes; None where that cannot be told without weights.
        kv_cache_memory: bytes that the operator allows for KV; None for what is left.
        kv_share: of what is left after the weights, for KV, where nothing else is said.
        max_num_seqs: sequences in one step.
        max_model_len: tokens of the longest sequence.
        max_source_len: positions of the longest source of an encoder-decoder; None for as many as its output has.
        is_static: whether each sequence of a step has a slot of the full length from the start.
        smallest_slot: tokens of the smallest slot; sizes double from there.
    """

    resident_bytes: int
    scratch_bytes: int
    widths: Widths
    num_step_tokens: int
    kv: KVCost | None
    kv_cache_memory: int | None
    kv_share: float
    max_num_seqs: int
    max_model_len: int
    max_source_len: int | None
    is_static: bool
    smallest_slot: int


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
        lengths: one entry a length, rising.
        problems: why the server would not start; empty when it would.
        warnings: what would be less than asked.
    """

    left_bytes: int
    kv_budget_bytes: int
    longest: int
    lengths: tuple[LengthPlan, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the server would start and serve."""
        return not self.problems


def make_plan(demand: Demand, free_bytes: int) -> Plan:
    """Hold a demand against the memory that is free."""
    left = free_bytes - demand.resident_bytes
    budget = demand.kv_cache_memory
    if budget is None:
        budget = int(max(0, left) * demand.kv_share)
    kv = demand.kv
    longest = 0
    lengths: tuple[LengthPlan, ...] = ()
    if kv is not None:
        longest = _longest(demand, kv, budget)
        shown = sorted({n for n in SHOWN_LENGTHS if n < demand.max_model_len} | {demand.max_model_len})
        if demand.is_static:
            shown = [demand.max_model_len]
        lengths = tuple(_at_length(demand, kv, budget, longest, num_tokens) for num_tokens in shown)
    problems = _problems(demand, left, budget, longest, lengths)
    return Plan(left, budget, longest, lengths, problems, () if problems else _warnings(demand, left, budget, longest))


def estimate_activations(demand: Demand, length: int) -> int:
    """Bytes that a step holds beside weights and KV when its longest sequence has `length` tokens; roughly.

    The residual stream and its copies, the widest layer's inputs and outputs, attention scores of a block of queries,
    and logits in the model's dtype and twice in float32 for the sampler.
    """
    widths, num_tokens = demand.widths, demand.num_step_tokens
    num_keys = length
    if demand.kv is not None:
        num_keys = max(length, _num_source(demand, demand.kv, length))
        if demand.kv.lane != "flat":
            num_tokens = max(num_tokens, num_keys)
    stream = num_tokens * (4 * widths.hidden + 3 * widths.widest) * widths.itemsize
    scores = widths.num_heads * min(num_tokens, _BLOCK_QUERIES) * num_keys * widths.itemsize
    logits = demand.max_num_seqs * widths.vocab_size * (widths.itemsize + 2 * 4)
    return stream + scores + logits + demand.scratch_bytes


def _num_source(demand: Demand, kv: KVCost, num_tokens: int) -> int:
    if not kv.bytes_per_source_position:
        return 0
    return kv.num_source_positions or demand.max_source_len or num_tokens


def _used(demand: Demand, kv: KVCost, num_tokens: int) -> int:
    cross = kv.bytes_per_source_position * _num_source(demand, kv, num_tokens)
    return kv.bytes_fixed + kv.bytes_per_token * num_tokens + cross


def _held(demand: Demand, kv: KVCost, num_tokens: int, longest: int) -> int:
    """Bytes of the slot that a sequence of this length gets; solo sequences have no slots and take what they use."""
    if demand.is_static or kv.lane == "solo" or num_tokens > longest:
        return _used(demand, kv, num_tokens)
    capacities = size_classes(min(demand.smallest_slot, longest), longest)
    capacity = next(capacity for capacity in capacities if capacity >= num_tokens)
    return _used(demand, kv, num_tokens) + kv.bytes_per_token * (capacity - num_tokens)


def _longest(demand: Demand, kv: KVCost, budget: int) -> int:
    """Tokens of the longest sequence that fits when it is alone."""
    if _used(demand, kv, demand.max_model_len) <= budget:
        return demand.max_model_len
    per_token, fixed = kv.bytes_per_token, _used(demand, kv, 0)
    if kv.bytes_per_source_position and not (kv.num_source_positions or demand.max_source_len):
        per_token += kv.bytes_per_source_position  # a source as long as its output
        fixed = kv.bytes_fixed
    return max(0, budget - fixed) // per_token if per_token else 0


def _at_length(demand: Demand, kv: KVCost, budget: int, longest: int, num_tokens: int) -> LengthPlan:
    held = _held(demand, kv, num_tokens, longest)
    batch, activations = held * demand.max_num_seqs, estimate_activations(demand, min(num_tokens, longest))
    if demand.is_static or not held:
        num_fitting = demand.max_num_seqs if batch <= budget else 0
    else:
        num_fitting = budget // held if num_tokens <= longest else 0
        batch = min(batch, budget)
    return LengthPlan(
        num_tokens=num_tokens,
        num_source_positions=_num_source(demand, kv, num_tokens),
        used_bytes=_used(demand, kv, num_tokens),
        held_bytes=held,
        batch_bytes=batch,
        activation_bytes=activations,
        peak_bytes=demand.resident_bytes + batch + activations,
        num_fitting=num_fitting,
    )


def _problems(demand: Demand, left: int, budget: int, longest: int, lengths: tuple[LengthPlan, ...]) -> tuple[str, ...]:
    if left < 0:
        return (f"the weights need {-left} bytes more than are free",)
    if demand.kv_cache_memory is not None and demand.kv_cache_memory > left:
        return (f"--kv-cache-memory {budget}: {left} bytes are left after the weights",)
    if demand.is_static and lengths and lengths[-1].batch_bytes > budget:
        return (f"--static-cache True: {lengths[-1].batch_bytes} bytes of slots, and {budget} are free for it",)
    if demand.kv is not None and longest < 1:
        return (f"not one token of KV fits into {budget} bytes",)
    return ()


def _warnings(demand: Demand, left: int, budget: int, longest: int) -> tuple[str, ...]:
    warnings = []
    if demand.kv is not None and longest < demand.max_model_len:
        warnings.append(
            f"a sequence of {demand.max_model_len} tokens does not fit: longer ones than {longest} are refused"
        )
    activations = estimate_activations(demand, longest)
    if activations > left - budget:
        warnings.append(
            f"{left - budget} bytes are left for activations, which may need {activations}: "
            "a smaller --kv-cache-memory or --max-batch-tokens leaves more"
        )
    return tuple(warnings)
