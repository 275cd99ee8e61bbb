"""Reads off a step's logits what was asked about prompts: their log-probabilities, and how likely a probe's tokens are.

Knows nothing of scheduling or of how tokens are chosen; what it reads hangs on the Sequence until its first output.
Called by engine.py once a step, before sampling.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from engine.batch import ScheduledSequence
from engine.errors import NonFiniteLogits, ServerError, UnsupportedParameter
from engine.sampling.probe import probabilities
from engine.sampling.sampler import Sampler
from engine.sequence import PromptProbe, Sequence


def read_prompts(items: Iterable[ScheduledSequence], logits: Tensor, sampler: Sampler) -> dict[int, ServerError]:
    """Note on their sequences what these items' logits say of prompts.

    Args:
        items: a step's, in the order of their logits.
        logits: [R, V] any float dtype, for each item its `num_logits` rows.
        sampler: scores prompts.

    Returns:
        By sequence id, why a sequence must fail; its neighbours are read all the same.
    """
    errors: dict[int, ServerError] = {}
    probed: list[tuple[Sequence, PromptProbe, int]] = []
    stop = 0
    for item in items:
        first, stop = stop, stop + item.num_logits
        sequence, params = item.sequence, item.sequence.params
        if sequence.output_token_ids:
            continue
        try:
            _score(item, logits[first:stop], sampler)
            if params.is_aligning and item.is_sampling and not sequence.alignment:
                raise UnsupportedParameter("is_aligning: this model tells no alignment", param="is_aligning")
        except ServerError as error:
            errors[sequence.sequence_id] = error
        if params.probe is not None and item.holds(params.probe.position):
            probed.append((sequence, params.probe, stop - (item.stop - params.probe.position)))
    told = probabilities(logits, [row for _, _, row in probed], [probe.token_ids for _, probe, _ in probed])
    for (sequence, probe, _), values in zip(probed, told, strict=True):
        sequence.probed = values
        if values is None:
            message = f"the model gave logits that are not finite at prompt token {probe.position}"
            errors.setdefault(sequence.sequence_id, NonFiniteLogits(message))
    return errors


def _score(item: ScheduledSequence, logits: Tensor, sampler: Sampler) -> None:
    """Note the log-probabilities of the prompt tokens that follow this item's tokens."""
    sequence = item.sequence
    num_top = sequence.params.num_prompt_logprobs
    following = sequence.prompt_token_ids[item.start + 1 : item.stop + 1]
    if following and num_top is not None:
        sequence.prompt_logprobs.extend(sampler.prompt_logprobs(logits[: len(following)], following, num_top))
