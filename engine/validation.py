"""Refuses what a sequence must not ask for: rules and probes that point outside the vocabulary or the prompt.

Knows nothing of tensors or models; no torch here.
Called by engine.py before a sequence is queued, and by engine/sampling/rules.py before its ids become indices: an id
out of range would reach a neighbour's logits.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import InvalidValue
from engine.sequence import PromptProbe, Sequence, TokenRules


def check_sequence(sequence: Sequence, vocab_size: int) -> None:
    """Check what concerns the prompt and the vocabulary of one sequence.

    Raises:
        InvalidValue: a position or a token id is out of range, or an alignment is asked for that cannot be.
    """
    params = sequence.params
    if params.token_rules is not None:
        check_rules(params.token_rules, vocab_size)
    if params.probe is not None:
        _check_probe(params.probe, len(sequence.prompt_token_ids), vocab_size)
    if params.is_aligning and params.max_tokens > 0:
        raise InvalidValue(f"is_aligning: max_tokens is {params.max_tokens} and must be 0", param="is_aligning")
    if params.is_aligning and sequence.source is None:
        raise InvalidValue("is_aligning: there is no source to align the prompt with", param="is_aligning")


def check_rules(rules: TokenRules, vocab_size: int) -> None:
    """Check that rules speak of the vocabulary only.

    Raises:
        InvalidValue: a token id is outside it, nothing is allowed, or the timestamps' ids are out of order.
    """
    _check_ids("token_rules", "suppressed", rules.suppressed, vocab_size)
    _check_ids("token_rules", "suppressed_first", rules.suppressed_first, vocab_size)
    _check_ids("token_rules", "allowed", rules.allowed or (), vocab_size)
    if rules.allowed == ():
        raise InvalidValue("token_rules.allowed: must name at least one token", param="token_rules")
    times = rules.timestamps
    if times is None:
        return
    ids = (times.end_of_text_id, times.no_timestamps_id, times.first_id)
    _check_ids("token_rules", "timestamps", ids, vocab_size)
    if times.end_of_text_id >= times.first_id:
        message = f"end_of_text_id {times.end_of_text_id} must be below first_id {times.first_id}"
        raise InvalidValue(f"token_rules.timestamps: {message}", param="token_rules")
    if times.max_initial_index is not None and times.max_initial_index < 0:
        message = f"max_initial_index {times.max_initial_index} must be at least 0"
        raise InvalidValue(f"token_rules.timestamps: {message}", param="token_rules")


def _check_probe(probe: PromptProbe, num_prompt: int, vocab_size: int) -> None:
    if not 0 <= probe.position < num_prompt:
        message = f"position {probe.position} is outside the prompt of {num_prompt} tokens"
        raise InvalidValue(f"probe: {message}", param="probe")
    _check_ids("probe", "token_ids", probe.token_ids, vocab_size)


def _check_ids(param: str, name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            message = f"token id {token_id} is outside the vocabulary of {vocab_size}"
            raise InvalidValue(f"{param}.{name}: {message}", param=param)
