"""The shapes of requests as they come over the wire, and the rules one object can check on its own.

Knows nothing of models, tokenizers or engines; fields nobody knows are kept, so that api/params.py can name them.
Read by api/; a leaf.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    model_validator,
)
from typing_extensions import TypeAliasType

T = TypeVar("T")
# Ends its validation at the first mistake: a million wrong items would otherwise make a million error records.
# A named alias, because FailFast is not hashable and so cannot stand in a union itself.
Items = TypeAliasType("Items", Annotated[list[T], FailFast()], type_params=(T,))


class WireModel(BaseModel):
    """Strict: no text is a number and no boolean an integer; unknown fields end up in `model_extra`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())


class ContentPart(WireModel):
    """One part of a message's content; other types than text keep their own fields."""

    type: str
    text: str | None = None


# Tags begin with a bar so that api/errors.py can leave them out of a field's name.
Content = Annotated[
    Annotated[str, Tag("|text")] | Annotated[Items[ContentPart], Tag("|parts")],
    Discriminator(lambda value: "|parts" if isinstance(value, list) else "|text"),
]


class ChatMessage(WireModel):
    """One message; fields that only some templates know (`reasoning_content`, ...) reach the template."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Items[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role tool needs tool_call_id")
        if self.content is None and self.role in ("system", "developer", "user"):
            raise ValueError(f"a message of role {self.role} needs content")
        return self


class StreamOptions(WireModel):
    """How a stream is framed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Stop = Annotated[
    Annotated[str, Tag("|text")] | Annotated[Items[str], Tag("|texts")],
    Discriminator(lambda value: "|texts" if isinstance(value, list) else "|text"),
]


EarlyStopping = Annotated[
    Annotated[bool, Tag("|bool")] | Annotated[Literal["never"], Tag("|word")],
    Discriminator(lambda value: "|word" if isinstance(value, str) else "|bool"),
]


# A schema as JSON has it, and also as its text.
JsonSchema = Annotated[
    Annotated[bool, Tag("|flag")] | Annotated[dict[str, Any], Tag("|schema")],
    Discriminator(lambda value: "|flag" if isinstance(value, bool) else "|schema"),
]
JsonSchemaOrText = Annotated[
    Annotated[str, Tag("|text")] | Annotated[JsonSchema, Tag("|json")],
    Discriminator(lambda value: "|text" if isinstance(value, str) else "|json"),
]


class JsonSchemaFormat(WireModel):
    """A JSON schema, and what it is called; its name and description are for the caller's own use."""

    name: str | None = None
    description: str | None = None
    # Not `schema`, which pydantic's own class has.
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(WireModel):
    """What the output must be like, as OpenAI says it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            rule = "needs json_schema" if self.type == "json_schema" else "cannot go with json_schema"
            raise ValueError(f"type {self.type} {rule}")
        return self


class StructuredOutputs(WireModel):
    """What the output must be like, as other servers of this API say it: one of these."""

    json_: JsonSchemaOrText | None = Field(default=None, alias="json")
    regex: str | None = None
    grammar: str | None = None
    choice: Items[str] | None = None


class GenerationFields(WireModel):
    """What chat and text completions have in common; None is the same as absent everywhere."""

    model: str = "model"
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Stop | None = None
    stop_token_ids: Items[int] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchemaOrText | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Items[str] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None
    truncate: int | None = None
    forced_bos_token: str | int | None = None
    source_language: str | None = None
    priority: int | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    user: str | None = None
    return_token_ids: bool | None = None


_MetadataKey = Annotated[str, Field(max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]


class ChatCompletionRequest(GenerationFields):
    """POST /chat/completions."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], Field(max_length=16)] | None = None
    safety_identifier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


def _prompt_kind(value: object) -> str:
    """Which of the four forms a prompt has, by its first item: the union must not try a million ids as texts."""
    if not isinstance(value, list):
        return "|text"
    first = value[0] if value else None
    if isinstance(first, str):
        return "|texts"
    return "|batch" if isinstance(first, list) else "|tokens"


Prompt = Annotated[
    Annotated[str, Tag("|text")]
    | Annotated[Items[str], Tag("|texts")]
    | Annotated[Items[int], Tag("|tokens")]
    | Annotated[Items[Items[int]], Tag("|batch")],
    Discriminator(_prompt_kind),
]


class CompletionRequest(GenerationFields):
    """POST /completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = None


class FormModel(BaseModel):
    """Fields of a form: all come as text, numbers and booleans are read from it, and an empty one is one not given."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _leave_out_empty(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value != "" or name not in cls.model_fields}


class ChunkingStrategy(FormModel):
    """How long audio is cut; `sequential` is ours."""

    type: Literal["auto", "server_vad", "sequential"]
    threshold: float | None = None
    prefix_padding_ms: int | None = None
    silence_duration_ms: int | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        for name in ("threshold", "prefix_padding_ms", "silence_duration_ms"):
            if self.type != "server_vad" and getattr(self, name) is not None:
                raise ValueError(f"{name} needs type server_vad, not {self.type}")
        return self


def _to_chunking(value: object) -> object:
    """`auto`, or the JSON text of an object; forms can also hold the object field by field."""
    if not isinstance(value, str):
        return value
    if value == "auto":
        return {"type": "auto"}
    try:
        strategy = json.loads(value)
    except (ValueError, RecursionError):
        strategy = None
    if not isinstance(strategy, dict):
        raise ValueError('should be auto or a JSON object such as {"type": "server_vad"}')
    return strategy


def _to_list(value: object) -> object:
    """A name without brackets brings one value."""
    return [value] if isinstance(value, str) else value


class TranscriptionBody(FormModel):
    """POST /audio/transcriptions and /audio/translations, but for the file."""

    model: str = "model"
    language: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt", "diarized_json"] = "json"
    temperature: float | None = None
    timestamp_granularities: Annotated[Items[Literal["word", "segment"]], BeforeValidator(_to_list)] | None = None
    stream: bool | None = None
    chunking_strategy: Annotated[ChunkingStrategy, BeforeValidator(_to_chunking)] | None = None
    seed: int | None = None
    priority: int | None = None
