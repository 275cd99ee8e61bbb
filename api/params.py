"""The one place where wire fields become SamplingParams: bounds, defaults, and what is derived from several fields.

Knows nothing of prompts' text or of how answers are framed.
Called by api/chat.py and api/completions.py.

Defaults are OpenAI's (temperature 1, top_p 1), whatever generation_config the checkpoint brings: the same request means
the same on every model, and nothing is applied that nobody asked for. ModelInfo shows the checkpoint's own values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from api import bounds
from api.beam_plan import beam_params
from api.grammars import GrammarPlan, grammar_plan
from engine.errors import ContextLengthExceeded, InvalidValue
from engine.sequence import SamplingParams
from models import ChatCompletionRequest, CompletionRequest, GenerationFields
from runtime.beams import BeamParams

MAX_CHOICES = 128
MAX_PRIORITY = 1000
MAX_CHAT_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
COMPLETION_TOKENS = 16
# Below it a softmax in float32 is one-hot, and the division would overflow.
MIN_TEMPERATURE = 1e-4
# Lower runs first. `fast` is what clients call `priority` too; `scale` is a contract this server does not know.
_TIERS = {
    "auto": "default",
    "default": "default",
    "scale": "default",
    "flex": "flex",
    "priority": "priority",
    "fast": "priority",
}
_TIER_PRIORITIES = {"priority": -10, "default": 0, "flex": 10}


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Everything a request asks of sampling, before its prompts' lengths are known.

    Args:
        params: for every choice, but for max_tokens and seed.
        max_tokens: as asked for; None for the endpoint's default.
        default_max_tokens: the endpoint's default; None for as much as the context holds.
        num_choices: choices per prompt.
        seed: as asked for.
        stop: strings that end a choice and are not part of it.
        priority: lower runs first.
        truncate: how many of a prompt's last tokens to keep; None for all.
        service_tier: under which the answer says it was served.
        beams: how to search; None for drawing each choice by itself.
        grammar: what the output must be like; None for anything.
    """

    params: SamplingParams
    max_tokens: int | None
    default_max_tokens: int | None
    num_choices: int
    seed: int | None
    stop: tuple[str, ...]
    priority: int
    truncate: int | None
    service_tier: str
    beams: BeamParams | None = None
    grammar: GrammarPlan | None = None

    @property
    def num_sequences(self) -> int:
        """Most sequences of the engine at once, per prompt."""
        return self.num_choices if self.beams is None else self.beams.num_beams

    def for_prompt(self, num_prompt_tokens: int, max_model_len: int, param: str) -> SamplingParams:
        """The parameters for a prompt of this length, seed aside; `param` is the field it came in.

        Raises:
            ContextLengthExceeded: prompt and output cannot both fit.
        """
        room = max_model_len - num_prompt_tokens
        wanted = self.max_tokens
        least = max(1, self.params.min_tokens) if wanted is None else wanted
        if least > room:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt_tokens} tokens and the output needs room for {least}, "
                f"but the context of this model holds {max_model_len} tokens",
                param=param,
            )
        if wanted is None:
            wanted = room if self.default_max_tokens is None else min(room, self.default_max_tokens)
        return dataclasses.replace(self.params, max_tokens=wanted)


def chat_plan(body: ChatCompletionRequest, vocab_size: int) -> SamplingPlan:
    """The plan of a chat completion; raises InvalidValue for a value out of its bounds."""
    if body.top_logprobs and not body.logprobs:
        raise InvalidValue(f"top_logprobs is {body.top_logprobs}: it needs logprobs true", param="top_logprobs")
    top = bounds.integer(body, "top_logprobs", 0, MAX_CHAT_LOGPROBS)
    is_newer = body.max_completion_tokens is not None
    name = "max_completion_tokens" if is_newer else "max_tokens"
    max_tokens = bounds.integer(body, name, 1)
    num_logprobs = (top or 0) if body.logprobs else None
    return _plan(body, vocab_size, max_tokens=max_tokens, default=None, num_logprobs=num_logprobs)


def completion_plan(body: CompletionRequest, vocab_size: int) -> SamplingPlan:
    """The plan of a text completion; raises InvalidValue for a value out of its bounds."""
    num_logprobs = bounds.integer(body, "logprobs", 0, MAX_COMPLETION_LOGPROBS)
    max_tokens = bounds.integer(body, "max_tokens", 0 if body.echo else 1)
    plan = _plan(body, vocab_size, max_tokens=max_tokens, default=COMPLETION_TOKENS, num_logprobs=num_logprobs)
    # An engine that makes no token has only the prompt's logprobs to give.
    is_scoring = bool(body.echo) and (num_logprobs is not None or max_tokens == 0)
    if not is_scoring:
        return plan
    if plan.grammar is not None and max_tokens == 0:
        raise InvalidValue(
            f"{plan.grammar.param} is given: it needs max_tokens of at least 1", param=plan.grammar.param
        )
    if plan.beams is not None:
        raise InvalidValue("max_tokens is 0: it must be at least 1 with num_beams above 1", param="max_tokens")
    return dataclasses.replace(plan, params=dataclasses.replace(plan.params, num_prompt_logprobs=num_logprobs or 0))


def _plan(
    body: GenerationFields, vocab_size: int, *, max_tokens: int | None, default: int | None, num_logprobs: int | None
) -> SamplingPlan:
    min_tokens = bounds.integer(body, "min_tokens", 0) or 0
    most = default if max_tokens is None else max_tokens
    if most is not None and min_tokens > most:
        raise InvalidValue(f"min_tokens is {min_tokens}: it must not exceed max_tokens ({most})", param="min_tokens")
    temperature = bounds.either(bounds.number(body, "temperature", 0, 2), 1.0)
    top_p = bounds.either(bounds.number(body, "top_p", 0, 1), 1.0)
    top_k = bounds.either(bounds.integer(body, "top_k", -1), 0)
    if top_p == 0:  # only the likeliest token is left
        top_p, top_k = 1.0, 1
    params = SamplingParams(
        max_tokens=1,
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_p=top_p,
        top_k=0 if top_k < 0 or top_k >= vocab_size else top_k,
        min_p=bounds.either(bounds.number(body, "min_p", 0, 1), 0.0),
        frequency_penalty=bounds.either(bounds.number(body, "frequency_penalty", -2, 2), 0.0),
        presence_penalty=bounds.either(bounds.number(body, "presence_penalty", -2, 2), 0.0),
        # CTRL's formula divides by it: a very small one would leave the range of float32.
        repetition_penalty=bounds.either(bounds.number(body, "repetition_penalty", 0.01, 100), 1.0),
        logit_bias=bounds.logit_bias(body.logit_bias, vocab_size),
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=bounds.stop_token_ids(body.stop_token_ids, vocab_size),
        num_logprobs=num_logprobs,
    )
    num_choices = bounds.either(bounds.integer(body, "n", 1, MAX_CHOICES), 1)
    beams = beam_params(body, params, num_choices)
    grammar = grammar_plan(body)
    if beams is not None and grammar is not None:
        rule = f"it cannot go with beam search (num_beams is {beams.num_beams})"
        raise InvalidValue(f"{grammar.param} is given: {rule}", param=grammar.param)
    tier = _TIERS[body.service_tier or "auto"]
    priority = bounds.integer(body, "priority", -MAX_PRIORITY, MAX_PRIORITY)
    return SamplingPlan(
        params=params,
        max_tokens=max_tokens,
        default_max_tokens=default,
        num_choices=num_choices,
        seed=bounds.integer(body, "seed", -(2**63), 2**64 - 1),
        stop=bounds.stop_strings(body.stop),
        priority=_TIER_PRIORITIES[tier] if priority is None else priority,
        truncate=bounds.integer(body, "truncate", 1),
        service_tier=tier,
        beams=beams,
        grammar=grammar,
    )
