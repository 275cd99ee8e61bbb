"""From a validated request to choices that are ready to run.

Knows nothing of how prompts were made or how answers look.
Called by api/chat.py and api/completions.py.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence as Series

from fastapi import Request
from pydantic import BaseModel

from api.deps import Parts
from api.generation import Choice
from api.params import SamplingPlan
from api.sources import ModelPrompt
from engine.errors import InvalidValue
from model_manager import GenerationRequest
from runtime.beams import BeamParams
from text.output import TextOutput

logger = logging.getLogger(__name__)

# Of one request, over all its prompts: each is a sequence with a queue of its own.
MAX_SEQUENCES = 1024
_SEED_MASK = 2**64 - 1


def make_choices(
    request: Request, parts: Parts, plan: SamplingPlan, prompts: Series[ModelPrompt], *, cache_salt: bytes, param: str
) -> list[Choice]:
    """Choices across prompts: the first `plan.num_choices` are the first prompt's, and so on.

    Args:
        request: for its time of arrival.
        parts: of the app.
        plan: what is asked of sampling.
        prompts: each as the model takes it.
        cache_salt: of the caller's key.
        param: the field the prompts came in.
    Raises:
        ContextLengthExceeded: a prompt and its output do not fit.
    """
    max_model_len = parts.manager.info.max_model_len
    params = [
        dataclasses.replace(plan.for_prompt(len(prompt.token_ids), max_model_len, param), grammar=prompt.grammar)
        for prompt in prompts
    ]
    seed = parts.seeds.getrandbits(63) if plan.seed is None else plan.seed
    choices = []
    for index in range(len(prompts) * plan.num_choices):
        prompt = prompts[index // plan.num_choices]
        generation = GenerationRequest(
            prompt_token_ids=prompt.token_ids,
            # The first choice has the request's own seed: n changes nothing for it.
            params=dataclasses.replace(params[index // plan.num_choices], seed=(seed + index) & _SEED_MASK),
            priority=plan.priority,
            cache_salt=cache_salt,
            arrival_time_s=request.state.arrival_s,
            source=prompt.source,
        )
        text = TextOutput(parts.manager.tokenizer, prompt.token_ids, stop=plan.stop)
        choices.append(Choice(index, generation, text, parts.metrics, _beams_for(plan, prompt)))
    return choices


def _beams_for(plan: SamplingPlan, prompt: ModelPrompt) -> BeamParams | None:
    """How to search from a prompt: what an encoder-decoder is made to begin with counts in a beam's length."""
    if plan.beams is None or prompt.source is None:
        return plan.beams
    return dataclasses.replace(plan.beams, num_forced_tokens=len(prompt.token_ids) - 1)


def check_num_sequences(num_prompts: int, num_choices: int) -> None:
    """Refuses a request of too many sequences, before any of them exists."""
    if num_prompts * num_choices > MAX_SEQUENCES:
        raise InvalidValue(
            f"prompt has {num_prompts} prompts of n or num_beams {num_choices}: at most {MAX_SEQUENCES} are allowed",
            param="prompt",
        )


def log_parameters(request: Request, body: BaseModel) -> None:
    """What was asked, at DEBUG, without what is to be read or heard."""
    if logger.isEnabledFor(logging.DEBUG):
        fields = body.model_dump(exclude={"messages", "prompt"}, exclude_none=True)
        logger.debug("request %s: %s %s", request.state.request_id, request.url.path, fields)
