"""What the fields of structured outputs ask the output to be like, and the grammars that come of it.

Knows nothing of how grammars are compiled or followed.
Called by api/params.py, and by the routes when the prompts are known.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from collections.abc import Sequence as Series
from dataclasses import dataclass
from typing import Any

from api.errors import shown
from api.sources import ModelPrompt
from engine.errors import InvalidValue
from model_manager import ModelManager
from models import GenerationFields
from text.errors import GrammarError
from text.grammar import GrammarSpec

MAX_GRAMMAR_CHARS = 128 << 10
MAX_CHOICES = 4096
_ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class GrammarPlan:
    """What the output must be like.

    Args:
        spec: that.
        param: the field that says so.
    """

    spec: GrammarSpec
    param: str


def grammar_plan(body: GenerationFields) -> GrammarPlan | None:
    """What the output must be like; None for anything.

    Raises:
        InvalidValue: a field is empty or too large, or two of them say something.
    """
    plans = [
        GrammarPlan(_checked(kind, value, param), param) for param, kind, value in _asked(body) if value is not None
    ]
    if len(plans) > 1:
        raise InvalidValue(
            f"{plans[0].param} and {plans[1].param} are given: only one of them can say what the output is like",
            param=plans[1].param,
        )
    return plans[0] if plans else None


def _asked(body: GenerationFields) -> Iterator[tuple[str, str, Any]]:
    """Fields, what kind of grammar each brings, and their values, where there are any."""
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_object":
        yield "response_format", "json", _ANY_OBJECT
    if wanted is not None and wanted.json_schema is not None:
        # A schema that is not given is anything.
        schema = {} if wanted.json_schema.schema_ is None else wanted.json_schema.schema_
        yield "response_format.json_schema.schema", "json", schema
    outputs = body.structured_outputs
    if outputs is not None:
        yield "structured_outputs.json", "json", outputs.json_
        yield "structured_outputs.regex", "regex", outputs.regex
        yield "structured_outputs.grammar", "lark", outputs.grammar
        yield "structured_outputs.choice", "choice", outputs.choice
    yield "guided_json", "json", body.guided_json
    yield "guided_regex", "regex", body.guided_regex
    yield "guided_grammar", "lark", body.guided_grammar
    yield "guided_choice", "choice", body.guided_choice


def _checked(kind: Any, value: Any, param: str) -> GrammarSpec:
    if value in ("", []):
        raise InvalidValue(f"{param} is {shown(value)}: it must not be empty", param=param)
    if kind == "choice" and len(value) > MAX_CHOICES:
        raise InvalidValue(f"{param} has {len(value)} items: at most {MAX_CHOICES} are allowed", param=param)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidValue(f"{param} has {len(text)} characters: at most {MAX_GRAMMAR_CHARS} are allowed", param=param)
    return GrammarSpec(kind, text)


async def with_grammars(
    manager: ModelManager, plan: GrammarPlan | None, prompts: Series[ModelPrompt]
) -> list[ModelPrompt]:
    """The prompts with the grammar of what follows each.

    Raises:
        InvalidValue: the grammar cannot be used.
    """
    if plan is None:
        return [*prompts]
    try:
        return [
            dataclasses.replace(prompt, grammar=await manager.grammar(plan.spec, prompt.token_ids))
            for prompt in prompts
        ]
    except GrammarError as error:
        raise InvalidValue(f"{plan.param} cannot be used: {error}", param=plan.param) from None
