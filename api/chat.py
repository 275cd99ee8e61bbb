"""POST /chat/completions.

Knows nothing of the engine's work; what comes back is deltas of text.
Mounted by app.py.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from api.answers import respond
from api.deps import CacheSalt, ChatBody, Parts, Place, UsesParts, check_reads_text
from api.envelope import Envelope
from api.fields import ignored_header, ignored_parameters
from api.generation import Choice, ChoiceDelta, fold, run, usage
from api.grammars import with_grammars
from api.logprobs import chat_logprobs
from api.params import SamplingPlan, chat_plan
from api.prepare import log_parameters, make_choices
from api.prompting import chat_ids
from api.sources import model_prompts
from models import ChatCompletionRequest

router = APIRouter()


@router.post("/chat/completions")
async def create_chat_completion(
    request: Request, parts: UsesParts, salt: CacheSalt, body: ChatBody, _place: Place
) -> Response:
    """Continues a conversation, as one body or as a stream."""
    log_parameters(request, body)
    ignored = ignored_parameters(body, is_strict=parts.settings.strict_parameters)
    check_reads_text(parts.manager.info)
    plan = chat_plan(body, parts.manager.info.vocab_size)
    ids = await chat_ids(parts.manager, body, plan.truncate)
    prompts = model_prompts(parts.manager, body, [ids], cache_salt=salt, param="messages")
    prompts = await with_grammars(parts.manager, plan.grammar, prompts)
    choices = make_choices(request, parts, plan, prompts, cache_salt=salt, param="messages")
    return await respond(
        request,
        run(parts.manager, choices),
        ChatAnswer(body, plan, parts, choices),
        is_streamed=bool(body.stream),
        headers=ignored_header(ignored),
    )


class ChatAnswer:
    """How the answer to one chat request looks."""

    media_type = "application/json"

    def __init__(self, body: ChatCompletionRequest, plan: SamplingPlan, parts: Parts, choices: list[Choice]) -> None:
        self._choices = choices
        self._metadata = body.metadata
        self._has_token_ids = bool(body.return_token_ids)
        self._pieces = parts.pieces if body.logprobs else None
        self._begun: set[int] = set()
        self._envelope = Envelope(
            id_prefix="chatcmpl",
            model=body.model,
            kind="chat.completion",
            chunk_kind="chat.completion.chunk",
            info=parts.manager.info,
            service_tier=plan.service_tier,
            has_usage=bool(body.stream_options and body.stream_options.include_usage),
        )

    def frames(self, delta: ChoiceDelta) -> bytes:
        """The role when it is the choice's first, then content if there is any, then the end if it is the last."""
        frames = b""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            frames += self._chunk(delta.index, {"role": "assistant", "content": "", "refusal": None})
        if delta.text or delta.entries or (self._has_token_ids and delta.token_ids):
            frames += self._chunk(delta.index, {"content": delta.text}, delta)
        if delta.finish_reason is not None:
            frames += self._chunk(delta.index, {}, finish_reason=delta.finish_reason)
        return frames

    def _chunk(
        self, index: int, fields: dict[str, object], delta: ChoiceDelta | None = None, finish_reason: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": fields, "logprobs": None, "finish_reason": finish_reason}
        if delta is not None:
            if delta.entries and self._pieces is not None:
                choice["logprobs"] = chat_logprobs(delta.entries, self._pieces)
            if self._has_token_ids:
                choice["token_ids"] = delta.token_ids
        return self._envelope.chunk(choice)

    def last_frames(self) -> bytes:
        """The usage, where it was asked for."""
        return self._envelope.usage_chunk(self._usage())

    async def whole(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> bytes:
        """The body of an answer that is not streamed."""
        folded = await fold(deltas, len(self._choices))
        answer = self._envelope.whole([self._choice(delta) for delta in folded], self._usage())
        if self._metadata is not None:
            answer["metadata"] = self._metadata
        return orjson.dumps(answer)

    def _choice(self, delta: ChoiceDelta) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": None if self._pieces is None else chat_logprobs(delta.entries, self._pieces),
            "finish_reason": delta.finish_reason,
        }
        if self._has_token_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = self._choices[delta.index].request.input_token_ids
        return choice

    def _usage(self) -> dict[str, object]:
        return usage(self._choices, len(self._choices))
