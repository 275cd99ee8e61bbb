"""What the fields of beam search ask for, and what they cannot be asked together with.

Knows nothing of how a search runs.
Called by api/params.py.
"""

from __future__ import annotations

from api import bounds
from engine.errors import InvalidValue
from engine.sequence import SamplingParams
from models import GenerationFields
from runtime.beams import BeamParams

MAX_BEAMS = 10
MAX_LENGTH_PENALTY = 10
# Compares sums of the model's own log-probabilities: what changes or draws from single ones has no place in it.
_NEUTRAL = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": ()}


def beam_params(body: GenerationFields, params: SamplingParams, num_choices: int) -> BeamParams | None:
    """How to search; None where a request asks for none.

    Args:
        body: the request.
        params: its sampling parameters.
        num_choices: per prompt; the best as many are given.
    Raises:
        InvalidValue: a value out of its bounds, or one that cannot go with beam search, or not without it.
    """
    num_beams = bounds.either(bounds.integer(body, "num_beams", 1, MAX_BEAMS), 1)
    length_penalty = bounds.number(body, "length_penalty", -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
    if num_beams == 1:
        for name in ("length_penalty", "early_stopping"):
            if getattr(body, name) is not None:
                raise InvalidValue(f"{name} is {getattr(body, name)}: it needs num_beams of at least 2", param=name)
        return None
    rule = f"it cannot go with beam search (num_beams is {num_beams})"
    if body.temperature is not None and params.temperature > 0:
        raise InvalidValue(f"temperature is {body.temperature:g}: {rule}; leave it out", param="temperature")
    for name, neutral in _NEUTRAL.items():
        if getattr(params, name) != neutral:
            raise InvalidValue(f"{name} is given: {rule}", param=name)
    if params.num_logprobs is not None:
        raise InvalidValue(f"logprobs are asked for: {rule}", param="logprobs")
    if num_choices > num_beams:
        raise InvalidValue(f"n is {num_choices}: it must not exceed num_beams ({num_beams})", param="n")
    return BeamParams(
        num_beams,
        bounds.either(length_penalty, 1.0),
        bounds.either(body.early_stopping, False),
        num_return_sequences=num_choices,
    )
