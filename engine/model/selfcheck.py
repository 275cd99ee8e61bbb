"""Which lane a model takes, found by trying: the flat lane only when it gives the plain forward's logits.

Knows nothing of requests, sampling or memory budgets.
Called once by engine.py when it is built. Flags of models lie both ways, so none decides here; what a short trial
cannot see (a position encoding that changes with length, masks that only bite far out) is read from the config and,
when in doubt, sends the model to the solo lane, which is exact for everything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from engine.batch import Batch, ScheduledSequence
from engine.kv.pool import ResizeArena, Slot
from engine.kv.slots import LayerShape, SlotStorage
from engine.model.attention import NAME, NotFlat, flat_attention
from engine.model.runner import FlatRunner, SoloRunner, accepts
from engine.model.step import Recording, flat_step
from engine.sequence import SamplingParams, Sequence, Source

logger = logging.getLogger(__name__)

# Relative error of a row's logits, norm of the difference over norm of the plain ones. A wrong mask, position or slot
# moves random prompts' logits by 0.3 and more; rounding in another order stays far below these.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
TOLERANCE_HALF = 0.08
# Whatever a model does when driven in a way it was not written for, the answer is the same: not this lane.
TRIAL_FAILURES = (
    RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, NotImplementedError, AssertionError,
)  # fmt: skip
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})  # frequencies depend on the longest position in the batch
_KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class LaneChoice:
    """What the check found.

    Args:
        lane: "flat" or "solo".
        reason: one sentence for the log and /health.
        shapes: KV of each layer (flat only).
        error: largest relative error over the rows compared (flat only).
    """

    lane: str
    reason: str
    shapes: tuple[LayerShape, ...] = ()
    error: float = 0.0


def choose_lane(model: Any, device: torch.device) -> LaneChoice:
    """Try the flat lane and leave the model set up for the lane it takes.

    Mutates:
        the attention implementation in the model's config: ours when flat, what it was when solo.
    """
    AttentionInterface.register(NAME, flat_attention)
    reason = why_not_flat(model.config)
    if reason is not None:
        return LaneChoice("solo", reason)
    original = _implementations(model)
    prompts = trial_prompts(model)
    try:
        expected = [_plain_logits(model, prompt, device) for prompt in prompts]
        _set_implementation(model, NAME)
        shapes = _record(model, prompts[0], device)
        error = _compare(model, prompts, expected, shapes, device)
    except NotFlat as refusal:
        reason = str(refusal)
    except TRIAL_FAILURES as failure:
        reason = f"the flat trial raised {type(failure).__name__}: {str(failure).split(chr(10))[0][:200]}"
    else:
        return LaneChoice("flat", f"agrees with the plain forward within {error:.1e}", shapes, error)
    _restore(model, original)
    return LaneChoice("solo", reason)


def why_not_flat(config: Any) -> str | None:
    """What the config says that a short trial could not see, or None."""
    text = config.get_text_config(decoder=True)
    for rope in _rope_parameters(text):
        kind = rope.get("rope_type", rope.get("type"))
        if kind in _LENGTH_DEPENDENT_ROPE:
            return f"its {kind} RoPE changes with the length of the longest sequence in a batch"
    layer_types = getattr(text, "layer_types", None) or ()
    unknown = sorted(set(layer_types) - _KNOWN_LAYER_TYPES)
    if unknown:
        return f"its layers include {', '.join(unknown)}"
    for name in ("attention_chunk_size", "attn_temperature_tuning"):
        if getattr(text, name, None):
            return f"its attention depends on {name}, beyond the length of a trial"
    return None


def record_shapes(model: Any, device: torch.device) -> tuple[LayerShape, ...]:
    """What the flat lane would store of each layer's token, from one forward that compares nothing.

    Works on a model without values too; leaves the model as it was.

    Raises:
        NotFlat: the model is not for that lane; a model that is driven so for the first time may raise anything else.
    """
    AttentionInterface.register(NAME, flat_attention)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    original = _implementations(model)
    _set_implementation(model, NAME)
    try:
        return _record(model, [position % vocab_size for position in range(8)], device)
    finally:
        _restore(model, original)


@dataclass(frozen=True, slots=True)
class SoloSizes:
    """Bytes a sequence's own cache takes: whatever its length, for each token, for each position of an encoder."""

    fixed: int
    per_token: int
    per_position: int


def measure_solo(runner: SoloRunner, vocab_size: int, *, has_encoder: bool = False) -> SoloSizes:
    """What a sequence's own cache takes, from short and long prompts and sources."""

    def measure(num_tokens: int, num_positions: int) -> int:
        source = None
        if has_encoder:
            source = Source(b"", num_positions, tuple(_any_ids(num_positions, vocab_size)))
        sequence = Sequence(
            -1, _any_ids(num_tokens, vocab_size), SamplingParams(max_tokens=1), arrival_time_s=0.0, source=source
        )
        runner.forward(Batch((ScheduledSequence(sequence, 0, num_tokens, 1),)))
        size = runner.state_bytes(sequence.sequence_id)
        runner.forget(sequence)
        return size

    short, long = 8, 40
    base = measure(short, short)
    per_token = max(0, -(-(measure(long, short) - base) // (long - short)))
    per_position = max(0, -(-(measure(short, long) - base) // (long - short))) if has_encoder else 0
    return SoloSizes(max(0, base - (per_token + per_position) * short), per_token, per_position)


def _any_ids(count: int, vocab_size: int) -> list[int]:
    return [(7 * position + 3) % vocab_size for position in range(count)]


def _rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(text_config, name, None)
        if isinstance(value, dict):
            # Some families keep one set of parameters per layer type.
            nested = [entry for entry in value.values() if isinstance(entry, dict)]
            found.extend(nested or [value])
    return found


def trial_prompts(model: Any) -> list[list[int]]:
    """Two random prompts, of 17 and 11 tokens."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    low = min(4, vocab_size - 1)
    return [torch.randint(low, vocab_size, (length,), generator=generator).tolist() for length in (17, 11)]


def _plain_logits(model: Any, token_ids: list[int], device: torch.device) -> torch.Tensor:
    output = model(input_ids=torch.tensor([token_ids], device=device), use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits


def _record(model: Any, token_ids: list[int], device: torch.device) -> tuple[LayerShape, ...]:
    """One flat forward that notes what attention is called with; raises NotFlat when that cannot be served."""
    for name in ("position_ids", "input_ids"):
        if not accepts(model, name):
            raise NotFlat(f"its forward takes no {name}")
    recording = Recording()
    with flat_step(recording):
        model(
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=torch.arange(len(token_ids), device=device)[None],
            use_cache=False,
        )
    text = model.config.get_text_config(decoder=True)
    num_layers = getattr(text, "num_hidden_layers", None)
    if not recording.shapes:
        raise NotFlat("its attention does not go through transformers' attention interface")
    if num_layers is not None and len(recording.shapes) != num_layers:
        raise NotFlat(f"{len(recording.shapes)} attention calls for {num_layers} layers")
    check_windows(text, recording.windows)
    return tuple(recording.shapes)


def check_windows(text_config: Any, windows: list[int | None]) -> None:
    """Raise NotFlat when the config knows of sliding windows that attention, called with `windows`, is not told of."""
    # A window that the model applies through its mask alone would go unseen until a prompt outgrows it.
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types and len(layer_types) == len(windows):
        for layer, (kind, window) in enumerate(zip(layer_types, windows, strict=True)):
            if (kind == "sliding_attention") != (window is not None):
                raise NotFlat(f"layer {layer} is {kind} and its attention is called with a window of {window}")
    elif getattr(text_config, "sliding_window", None) and not any(windows):
        raise NotFlat("its config has a sliding window that its attention is not told of")


def _compare(
    model: Any,
    prompts: list[list[int]],
    expected: list[torch.Tensor],
    shapes: tuple[LayerShape, ...],
    device: torch.device,
) -> float:
    """Both prompts interleaved over several steps, in slots, against plain forwards; the largest relative error."""
    storage = SlotStorage(shapes, device)
    capacity = 32
    storage.apply([ResizeArena(capacity, (), 3)])
    sequences = [
        Sequence(number, prompt, SamplingParams(max_tokens=1), arrival_time_s=0.0)
        for number, prompt in enumerate(prompts)
    ]
    # Not slots 0 and 1 in order: a row that reads another's slot must show.
    slots = {0: Slot(capacity, 2), 1: Slot(capacity, 0)}
    slot_of: Callable[[Sequence], Slot] = lambda sequence: slots[sequence.sequence_id]  # noqa: E731
    runner = FlatRunner(model, storage, slot_of, device)
    errors: list[float] = []
    for step in trial_steps(len(prompts[0]), len(prompts[1])):
        items = tuple(ScheduledSequence(sequences[n], start, count, count) for n, start, count in step)
        result = runner.forward(Batch(items))
        wanted = torch.cat([expected[i.sequence.sequence_id][i.start : i.start + i.num_tokens] for i in result.items])
        errors.extend(row_errors(result.logits, wanted))
    return judge(errors, shapes[0].dtype)


def trial_steps(long: int, short: int) -> list[list[tuple[int, int, int]]]:
    """Steps of (sequence, start, tokens) for two prompts: a chunk, a chunk beside a prompt, a single token beside a
    chunk, single tokens together."""
    return [
        [(0, 0, 6)],
        [(0, 6, 7), (1, 0, short - 4)],
        [(0, 13, 1), (1, short - 4, 2)],
        [(0, 14, 1), (1, short - 2, 1)],
        [(1, short - 1, 1), (0, 15, 1)],
        [(0, 16, long - 16)],
    ]


def row_errors(logits: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """Relative error of each row of [R, V]: norm of the difference over norm of the wanted."""
    difference = (logits.float() - wanted.float()).norm(dim=-1)
    errors: list[float] = (difference / wanted.float().norm(dim=-1).clamp_min(1e-6)).tolist()
    return errors


def judge(errors: list[float], dtype: torch.dtype) -> float:
    """The largest error, if it is no more than rounding; raises NotFlat otherwise."""
    worst, median = max(errors), sorted(errors)[len(errors) // 2]
    if dtype in TOLERANCE:
        is_good = worst <= TOLERANCE[dtype]
    else:
        # In half precision a router may send single tokens elsewhere; the bulk must agree.
        is_good = median <= TOLERANCE_HALF and worst <= 10 * TOLERANCE_HALF
    if not is_good or math.isnan(worst):
        raise NotFlat(f"the flat trial's logits differ from the plain forward's by {worst:.1e} (median {median:.1e})")
    return worst


def _configs(model: Any) -> list[Any]:
    return list({id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values())


def _implementations(model: Any) -> list[tuple[Any, Any]]:
    return [(config, getattr(config, "_attn_implementation", None)) for config in _configs(model)]


def _set_implementation(model: Any, name: str) -> None:
    for config in _configs(model):
        config._attn_implementation = name


def _restore(model: Any, implementations: list[tuple[Any, Any]]) -> None:
    for config, name in implementations:
        config._attn_implementation = name
