"""POST /completions.

Knows nothing of the engine's work; what comes back is deltas of text.
Mounted by app.py.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import cast

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from api.answers import respond
from api.deps import CacheSalt, CompletionBody, Parts, Place, UsesParts, check_reads_text
from api.envelope import Envelope
from api.fields import ignored_header, ignored_parameters
from api.generation import Choice, ChoiceDelta, fold, run, usage
from api.grammars import with_grammars
from api.logprobs import CompletionLogprobs
from api.params import SamplingPlan, completion_plan
from api.prepare import check_num_sequences, log_parameters, make_choices
from api.prompting import completion_ids
from api.sources import model_prompts
from engine.errors import InvalidValue, UnsupportedParameter
from engine.sequence import TokenLogprobs
from models import CompletionRequest

router = APIRouter()


@router.post("/completions")
async def create_completion(
    request: Request, parts: UsesParts, salt: CacheSalt, body: CompletionBody, _place: Place
) -> Response:
    """Continues texts or token ids, as one body or as a stream."""
    log_parameters(request, body)
    ignored = ignored_parameters(body, is_strict=parts.settings.strict_parameters)
    manager = parts.manager
    check_reads_text(manager.info)
    if body.echo and manager.info.max_source_len is not None:
        raise UnsupportedParameter("echo is true: an encoder-decoder does not continue its prompt", param="echo")
    plan = completion_plan(body, manager.info.vocab_size)
    prompts = _prompts(body)
    check_num_sequences(len(prompts), plan.num_sequences)
    all_ids = await completion_ids(manager, prompts, plan.truncate)
    made = model_prompts(manager, body, all_ids, cache_salt=salt, param="prompt")
    made = await with_grammars(manager, plan.grammar, made)
    choices = make_choices(request, parts, plan, made, cache_salt=salt, param="prompt")
    echoes = (
        [_echo(parts, prompt, ids, plan.truncate) for prompt, ids in zip(prompts, all_ids, strict=True)]
        if body.echo
        else []
    )
    return await respond(
        request,
        run(manager, choices),
        CompletionAnswer(body, plan, parts, choices, echoes),
        is_streamed=bool(body.stream),
        headers=ignored_header(ignored),
    )


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request, which may be one text, one list of ids, or several of either."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidValue("prompt is []: it must have at least one item", param="prompt")
    return [prompt] if isinstance(prompt[0], int) else cast("list[str | list[int]]", prompt)


def _echo(parts: Parts, prompt: str | list[int], ids: list[int], truncate: int | None) -> str:
    """The prompt as text: the caller's own where it was whole text, else what its ids say."""
    if isinstance(prompt, str) and truncate is None:
        return prompt
    return str(parts.manager.tokenizer.decode(ids))


class CompletionAnswer:
    """How the answer to one text completion looks.

    Args:
        body: the request.
        plan: what it asks of sampling.
        parts: of the app.
        choices: all of them, prompt after prompt.
        echoes: the text that goes before each prompt's completions; empty without echo.
    """

    media_type = "application/json"

    def __init__(
        self, body: CompletionRequest, plan: SamplingPlan, parts: Parts, choices: list[Choice], echoes: list[str]
    ) -> None:
        self._choices = choices
        self._echoes = echoes
        self._num_choices = plan.num_choices
        self._has_token_ids = bool(body.return_token_ids)
        self._logprobs = [] if body.logprobs is None else [CompletionLogprobs(parts.pieces) for _ in choices]
        self._begun: set[int] = set()
        self._envelope = Envelope(
            id_prefix="cmpl",
            model=body.model,
            kind="text_completion",
            chunk_kind="text_completion",
            info=parts.manager.info,
            service_tier=plan.service_tier,
            has_usage=bool(body.stream_options and body.stream_options.include_usage),
        )

    def frames(self, delta: ChoiceDelta) -> bytes:
        """The echo with the choice's first text, text if there is any, then the end if it is the last."""
        frames = b""
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        has_echo = is_first and bool(self._echoes)
        if has_echo or delta.text or delta.entries or (self._has_token_ids and delta.token_ids):
            frames += self._envelope.chunk(self._choice(delta, has_echo=has_echo, finish_reason=None))
        if delta.finish_reason is not None:
            end = ChoiceDelta(delta.index, "", finish_reason=delta.finish_reason)
            frames += self._envelope.chunk(self._choice(end, has_echo=False, finish_reason=delta.finish_reason))
        return frames

    def last_frames(self) -> bytes:
        """The usage, where it was asked for."""
        return self._envelope.usage_chunk(self._usage())

    async def whole(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> bytes:
        """The body of an answer that is not streamed."""
        folded = await fold(deltas, len(self._choices))
        choices = []
        for delta in folded:
            choice = self._choice(delta, has_echo=bool(self._echoes), finish_reason=delta.finish_reason)
            if self._has_token_ids:
                choice["prompt_token_ids"] = self._choices[delta.index].request.input_token_ids
            choices.append(choice)
        return orjson.dumps(self._envelope.whole(choices, self._usage()))

    def _choice(self, delta: ChoiceDelta, *, has_echo: bool, finish_reason: str | None) -> dict[str, object]:
        text = delta.text
        echo = self._echoes[delta.index // self._num_choices] if has_echo else ""
        choice: dict[str, object] = {
            "index": delta.index,
            "text": echo + text,
            "logprobs": self._chunk_logprobs(delta, echo, has_echo=has_echo),
            "finish_reason": finish_reason,
        }
        if self._has_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _chunk_logprobs(self, delta: ChoiceDelta, echo: str, *, has_echo: bool) -> dict[str, object] | None:
        if not self._logprobs:
            return None
        given: list[tuple[int, TokenLogprobs | None]] = []
        if has_echo:
            ids = self._choices[delta.index].request.prompt_token_ids
            given += zip(ids, delta.prompt_logprobs or (), strict=True)
        given += ((entry.token_id, entry.logprobs) for entry in delta.entries)
        if not given and not delta.text:
            return None
        return self._logprobs[delta.index].chunk(given, echo + delta.text)

    def _usage(self) -> dict[str, object]:
        return usage(self._choices, self._num_choices)
