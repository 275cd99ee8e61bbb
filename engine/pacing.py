"""How many prompt tokens a step may carry while others stream, so that a long prompt never stalls them.

Knows nothing of sequences or tensors; measures steps and predicts. No torch here.
Asked by the scheduler, told by engine.py how long each step took.
"""

from __future__ import annotations

MIN_PROMPT_TOKENS = 16  # progress is promised, however slow the machine
SMOOTHING = 0.1  # weight of the newest measurement
# With one prompt, a step may take this many times a step without: below the threefold that readers would notice.
MAX_SLOWDOWN = 2.2
# With a burst of prompts it may take longer, in proportion to how many wait for their first token, up to here.
MAX_STEP_S = 0.25


class Pacing:
    """Learns what a step costs and bounds the prompt tokens that share one with running streams."""

    def __init__(self) -> None:
        self._stream_step_s: dict[int, float] = {}  # by how many streams: 1, 2-3, 4-7, ...
        # Of steps with prompts what they took beyond their streams, and their tokens, the former ones ever lighter:
        # a step of few tokens costs more for each, and says less.
        self._prompts_s = 0.0
        self._prompt_tokens = 0.0

    def prompt_tokens(self, budget: int, *, num_streams: int, num_prompts: int) -> int:
        """Prompt tokens that the next step may compute, at most `budget`.

        With nobody streaming there is nobody to disturb; before anything was measured, the least is allowed.
        `num_prompts` sequences have prompt tokens left to compute or wait for a place.
        """
        if num_streams == 0:
            return budget
        stream_step_s = self._stream_step(num_streams)
        if stream_step_s is None or not self._prompt_tokens:
            return min(budget, MIN_PROMPT_TOKENS)
        for_one_s = (MAX_SLOWDOWN - 1.0) * stream_step_s
        extra_s = max(for_one_s, min(num_prompts * for_one_s, MAX_STEP_S - stream_step_s))
        return min(budget, max(MIN_PROMPT_TOKENS, int(extra_s * self._prompt_tokens / self._prompts_s)))

    def observe(self, *, num_streams: int, num_prompt_tokens: int, duration_s: float) -> None:
        """Note one step: `duration_s` seconds for so many streams' tokens and prompt tokens."""
        if num_prompt_tokens == 0:
            size = num_streams.bit_length()
            self._stream_step_s[size] = _smooth(self._stream_step_s.get(size), duration_s)
        else:
            base_s = (self._stream_step(num_streams) or 0.0) if num_streams else 0.0
            self._prompts_s += max(duration_s - base_s, 0.1 * duration_s) - SMOOTHING * self._prompts_s
            self._prompt_tokens += num_prompt_tokens - SMOOTHING * self._prompt_tokens

    def _stream_step(self, num_streams: int) -> float | None:
        """What a step of streams alone takes, of the measured number of them that is next to this one."""
        known, size = self._stream_step_s, num_streams.bit_length()
        return known[min(known, key=lambda other: abs(other - size))] if known else None


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
