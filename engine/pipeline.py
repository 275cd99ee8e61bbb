"""Which step may be launched while the tokens of the one before it are being chosen, so that the device never waits.

Knows nothing of tensors; no torch here.
Asked by engine.py between launching a step and reading its tokens.

    host     launch N+1 | read N, deliver it | launch N+2 | read N+1, deliver it | ...
    device   ......... step N .........|......... step N+1 .........|......... step N+2 ...

Step N+1 is about the sequences of step N, whose newest tokens it takes from the device. Nothing else may be about to
happen: whoever arrives, is preempted or has its prompt computed is scheduled when all that is known.

A sequence that turns out to have ended with step N has a row in step N+1 for nothing. Its result is dropped, and what
it writes hurts nobody: the one position lies past the tokens that were committed, so it is in no block that is shared,
and the memory is given back only when step N+1 has landed (Scheduler.finish), cleared if that row was not finite.
"""

from __future__ import annotations

from engine.batch import Batch, ScheduledSequence
from engine.kv.accounting import KVAccounting
from engine.scheduler import Scheduler

PAUSE_STEPS = 8
"""Steps launched one by one after a token had to be chosen again, which makes a sequence's next row one for nothing."""


class Pipeline:
    """Plans steps ahead.

    Args:
        is_on: whether ever.
        scheduler: of the steps that are not planned ahead.
        kv: the accounting of KV memory.
        max_model_len: most tokens of a sequence.
    """

    def __init__(self, *, is_on: bool, scheduler: Scheduler, kv: KVAccounting, max_model_len: int) -> None:
        self.is_on = is_on
        self._scheduler = scheduler
        self._kv = kv
        self._max_model_len = max_model_len
        self._num_to_pause = 0

    def pause(self) -> None:
        """Launch the next few steps one by one."""
        self._num_to_pause = PAUSE_STEPS

    def next_batch(self, items: tuple[ScheduledSequence, ...]) -> Batch | None:
        """The step after the one that computes `items`, whose tokens are not known; None to wait for them.

        Args:
            items: all that is in flight, but for rows that were launched for nothing.
        """
        if not self.is_on or self._scheduler.waiting:
            return None
        if self._num_to_pause:
            self._num_to_pause -= 1
            return None
        items = tuple(item for item in items if not item.sequence.is_finished)  # some were aborted since
        if len(items) != len(self._scheduler.running) or not all(map(_is_predictable, items)):
            return None
        # Who gets its last token now has no next one.
        going_on = [item for item in items if self._may_go_on(item)]
        if not all(self._kv.extend(item.sequence, item.stop + 1) for item in going_on):
            return None
        return Batch(tuple(ScheduledSequence(i.sequence, i.stop, 1, 1) for i in going_on)) if going_on else None

    def _may_go_on(self, item: ScheduledSequence) -> bool:
        sequence = item.sequence
        num_output = len(sequence.output_token_ids) + 1
        return num_output < sequence.params.max_tokens and sequence.num_tokens + 1 < self._max_model_len


def _is_predictable(item: ScheduledSequence) -> bool:
    """Whether all but the id of the token that this item makes is known, and the id concerns the model alone."""
    sequence, params = item.sequence, item.sequence.params
    has_one_token = item.num_tokens == 1 and item.is_sampling
    return has_one_token and not params.needs_history and params.min_tokens <= len(sequence.output_token_ids)
