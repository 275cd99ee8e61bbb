"""What a sequence's keys, values and states take, found without weights: the engine's own trials on a drawn model.

Knows nothing of budgets or machines; what a trial without values cannot tell (whether logits agree) it leaves open.
Called by runtime/planning.py with a model of model/blueprint.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.kv.slots import LayerShape
from engine.model.attention import NotFlat
from engine.model.loader import family_of
from engine.model.runner import SoloRunner
from engine.model.selfcheck import TRIAL_FAILURES, measure_solo, record_shapes, why_not_flat
from engine.model.seq2seq_check import try_flat
from engine.model.valueless import META, valueless

logger = logging.getLogger(__name__)

_TRIED_POSITIONS = 64  # of a decoder sequence: enough for a trial
_IF_EXACT = "if the check at load finds its logits exact, else solo"
_UNDECIDED = "the check at load decides"
_RAISED = "the flat trial raised"  # how a trial's reason begins when it is no refusal: without values, it may mislead


class NotMeasurable(Exception):
    """This model's forward depends on values: what a sequence takes is known once it is loaded."""


@dataclass(frozen=True, slots=True)
class KVCost:
    """What a sequence takes.

    Args:
        lane: flat, solo or seq2seq; the one expected.
        is_certain: whether the check at load cannot decide otherwise.
        reason: why this lane.
        bytes_per_token: of each token of a decoder.
        bytes_fixed: of a sequence whatever its length: recurrent and convolution states.
        bytes_per_source_position: of keys and values of cross-attention, for each position of an encoder's output.
        windows: how many layers see only a window, and its size; None without.
    """

    lane: str
    is_certain: bool
    reason: str
    bytes_per_token: int
    bytes_fixed: int = 0
    bytes_per_source_position: int = 0
    windows: tuple[int, int] | None = None


def measure_kv(model: Any) -> KVCost:
    """What a sequence of a drawn model takes, and by which lane it would be served.

    Mutates:
        the model, as a lane's set-up does.

    Raises:
        NotMeasurable: the forward depends on values.
    """
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the others sort tokens by expert, which is a value
    is_decoder = family_of(model.config) == "decoder"
    with valueless():
        return _decoder(model) if is_decoder else _encoder_decoder(model)


def _decoder(model: Any) -> KVCost:
    reason, is_certain = why_not_flat(model.config), True
    if reason is None:
        try:
            shapes = record_shapes(model, META)
        except NotFlat as refusal:
            reason = str(refusal)
        except TRIAL_FAILURES as failure:
            logger.debug("the flat trial without values failed", exc_info=failure)
            reason, is_certain = _UNDECIDED, False
        else:
            return KVCost("flat", False, _IF_EXACT, _bytes(shapes), windows=_windows(model.config))
    return _solo(model, reason, is_certain=is_certain)


def _encoder_decoder(model: Any) -> KVCost:
    is_speech = family_of(model.config) == "speech"
    try:
        parts = try_flat(model, META, num_positions=_TRIED_POSITIONS, is_speech=is_speech)
    except Exception as failure:  # of a model that fails before the trial begins
        raise NotMeasurable(_in_one_line(failure)) from failure
    if isinstance(parts, str):
        is_certain = not parts.startswith(_RAISED)
        return _solo(model, parts if is_certain else _UNDECIDED, is_certain=is_certain)
    cross = _bytes(parts.cross_shapes)
    return KVCost("seq2seq", False, _IF_EXACT, _bytes(parts.shapes), bytes_per_source_position=cross)


def _solo(model: Any, reason: str, *, is_certain: bool) -> KVCost:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    has_encoder = family_of(model.config) != "decoder"
    try:
        sizes = measure_solo(SoloRunner(model, META), vocab_size, has_encoder=has_encoder)
    except (*TRIAL_FAILURES, NotFlat) as failure:
        raise NotMeasurable(_in_one_line(failure)) from failure
    return KVCost(
        "solo", is_certain, reason, sizes.per_token, sizes.fixed, sizes.per_position, windows=_windows(model.config)
    )


def _bytes(shapes: Sequence[LayerShape]) -> int:
    return sum(shape.bytes_per_token for shape in shapes)


def _in_one_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"


def _windows(config: Any) -> tuple[int, int] | None:
    """How many layers see only a window, and its size."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or not getattr(text, "use_sliding_window", True):
        return None
    layer_types = getattr(text, "layer_types", None)
    if layer_types is None:
        return text.num_hidden_layers, window
    num_sliding = sum(1 for kind in layer_types if kind == "sliding_attention")
    return (num_sliding, window) if num_sliding else None
