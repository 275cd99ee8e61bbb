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
        self._stream_step_s: float | None = None
        self._prompt_token_s: float | None = None

    def prompt_tokens(self, budget: int, *, num_streams: int, num_prompts: int) -> int:
        """Prompt tokens that the next step may compute, at most `budget`.

        With nobody streaming there is nobody to disturb; before anything was measured, the least is allowed.
        `num_prompts` sequences have prompt tokens left to compute or wait for a place.
        """
        if num_streams == 0:
            return budget
        if self._stream_step_s is None or self._prompt_token_s is None:
            return min(budget, MIN_PROMPT_TOKENS)
        for_one_s = (MAX_SLOWDOWN - 1.0) * self._stream_step_s
        extra_s = max(for_one_s, min(num_prompts * for_one_s, MAX_STEP_S - self._stream_step_s))
        return min(budget, max(MIN_PROMPT_TOKENS, int(extra_s / self._prompt_token_s)))

    def observe(self, *, num_streams: int, num_prompt_tokens: int, duration_s: float) -> None:
        """Note one step: `duration_s` seconds for so many streams' tokens and prompt tokens."""
        if num_prompt_tokens == 0:
            self._stream_step_s = _smooth(self._stream_step_s, duration_s)
        else:
            base_s = (self._stream_step_s or 0.0) if num_streams else 0.0
            cost_s = max(duration_s - base_s, 0.1 * duration_s) / num_prompt_tokens
            self._prompt_token_s = _smooth(self._prompt_token_s, cost_s)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
