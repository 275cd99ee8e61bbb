"""One step between its launch and its landing: the device computes, and the host need not look.

Knows nothing of scheduling policy or of what becomes of the tokens.
Launched and collected by engine.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.batch import Batch, Chosen, ScheduledSequence
from engine.errors import ServerError
from engine.model.chosen_ids import ChosenIds
from engine.model.runner import Runner, StepLogits
from engine.prompt_reader import read_prompts
from engine.sampling.pending import PendingTokens
from engine.sampling.sampler import Sampler
from engine.sequence import Sequence
from engine.transfer import upload


@dataclass(frozen=True, slots=True)
class Landing:
    """What a step came to.

    Args:
        items: the batch's, in the order of their logits.
        chosen: tokens by sequence id.
        errors: by sequence id, why a sequence must fail.
        revised: ids of sequences whose token is not the one that the device has.
    """

    items: tuple[ScheduledSequence, ...]
    chosen: dict[int, Chosen] = field(default_factory=dict)
    errors: dict[int, ServerError] = field(default_factory=dict)
    revised: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Flight:
    """A step that was launched.

    Args:
        batch: what it computes.
        started_s: when, by time.perf_counter().
        items: the batch's, in the order of their logits.
        sequences: those whose next token is chosen, in the order of `pending`'s rows.
        pending: their tokens; None when there are no such sequences.
        errors: by sequence id, what is known to have failed.
        failure: why there is nothing to collect; it is raised then, and not before, in the turn of this step.
        has_lost_storage: whether `failure` left KV that cannot be trusted.
        for_nothing: ids of sequences whose row here began with a wrong token.
    """

    batch: Batch
    started_s: float
    items: tuple[ScheduledSequence, ...] = ()
    sequences: list[Sequence] = field(default_factory=list)
    pending: PendingTokens | None = None
    errors: dict[int, ServerError] = field(default_factory=dict)
    failure: Exception | None = None
    has_lost_storage: bool = False
    for_nothing: set[int] = field(default_factory=set)

    @property
    def live_items(self) -> tuple[ScheduledSequence, ...]:
        """The items that compute what they should."""
        return tuple(item for item in self.batch.items if item.sequence.sequence_id not in self.for_nothing)

    def chosen_ids(self) -> ChosenIds | None:
        """The tokens, as far as the device knows them."""
        if self.pending is None:
            return None
        rows = {sequence.sequence_id: row for row, sequence in enumerate(self.sequences)}
        return ChosenIds(self.pending.token_ids, rows)

    def collect(self) -> Landing:
        """Wait for the step.

        Raises:
            Exception: the launch failed, or the device did.
        """
        if self.failure is not None:
            raise self.failure
        landing = Landing(self.items, errors=self.errors)
        if self.pending is None:
            return landing
        sampled = self.pending.collect()
        for row, sequence in enumerate(self.sequences):
            error = sampled.errors[row]
            if error is not None:
                landing.errors[sequence.sequence_id] = error
            else:
                landing.chosen[sequence.sequence_id] = Chosen(sampled.token_ids[row], sampled.logprobs[row])
        landing.revised.update(self.sequences[row].sequence_id for row in sampled.revised)
        return landing


def take_off(flight: Flight, runner: Runner, sampler: Sampler, after: Flight | None) -> None:
    """Launch a step.

    Args:
        flight: says what to compute, and is told what comes of it.
        runner, sampler: the lane's.
        after: the step before it, when that has not been collected: the input tokens are taken from there.
    """
    if after is None:
        result = runner.forward(flight.batch)
        flight.errors = read_prompts(result.items, result.logits, sampler)
    else:
        result = runner.forward(flight.batch, after.chosen_ids())
    flight.items = result.items
    rows = _rows_to_sample(result, flight.sequences)
    if not rows:
        return
    logits = result.logits
    if rows != list(range(logits.shape[0])):
        logits = logits[upload(rows, torch.int64, logits.device)]
    flight.pending = sampler.launch(logits, flight.sequences, num_unknown=0 if after is None else 1)


def _rows_to_sample(result: StepLogits, sequences: list[Sequence]) -> list[int]:
    """The rows of logits after the last known token of a sequence, and into `sequences` whose they are."""
    rows: list[int] = []
    last = 0
    for item in result.items:
        last += item.num_logits
        if item.is_sampling and item.sequence.params.max_tokens > 0:
            rows.append(last - 1)
            sequences.append(item.sequence)
    return rows
