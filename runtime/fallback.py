"""Whether what was written of a window can stand, is silence, or should be tried again with more chance in it.

Knows nothing of engines, tokens or audio; the thresholds are those the models were published with.
Called by runtime/window_decoding.py.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LADDER = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MAX_COMPRESSION_RATIO = 2.4
MIN_AVG_LOGPROB = -1.0
MAX_NO_SPEECH_PROB = 0.6

Verdict = Literal["good", "silent", "doubtful"]


@dataclass(frozen=True, slots=True)
class Confidence:
    """How sure the model was of what it wrote.

    Args:
        avg_logprob: mean log-probability of the tokens, the one that ended them included.
        compression_ratio: bytes of the text over bytes of it compressed; 0 for no text.
        no_speech_prob: probability that nothing is spoken, told before anything is written.
    """

    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float

    @property
    def verdict(self) -> Verdict:
        """Silence is what the model doubts and did not expect; what repeats itself or is doubted was written badly."""
        is_doubted = self.avg_logprob < MIN_AVG_LOGPROB
        if is_doubted and self.no_speech_prob > MAX_NO_SPEECH_PROB:
            return "silent"
        is_repeating = self.compression_ratio > MAX_COMPRESSION_RATIO
        return "doubtful" if is_doubted or is_repeating else "good"


def temperatures(asked: float) -> tuple[float, ...]:
    """Those to try in turn: the ladder for 0, else the one that was asked for."""
    return (asked,) if asked > 0 else LADDER


def mean(logprobs: Sequence[float]) -> float:
    """0 for none."""
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def compression_ratio(text: str) -> float:
    """How many times smaller zlib makes a text; high when it says the same over and over."""
    data = text.strip().encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def seed_of_try(seed: int, window: int, number: int) -> int:
    """A seed for each try of each window: equal for equal requests, unrelated otherwise."""
    digest = hashlib.sha256(f"{seed} {window} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
