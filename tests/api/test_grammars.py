"""Structured outputs on the wire: every spelling of the same wish, and every mistake by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.grammars import MAX_CHOICES, MAX_GRAMMAR_CHARS, grammar_plan
from engine.errors import InvalidValue
from models import CompletionRequest
from tests.api.conftest import MakeHarness, run_async
from tests.api.test_chat import HELLO, post
from text.grammar import GrammarSpec

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TEXT = json.dumps(SCHEMA)


def plan(**fields: Any) -> Any:
    return grammar_plan(CompletionRequest.model_validate({"prompt": "a", **fields}))


@pytest.mark.parametrize(
    ("fields", "param", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "json", '{"type":"object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            "response_format.json_schema.schema",
            "json",
            TEXT,
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "json",
            "{}",
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", "json", TEXT),
        ({"structured_outputs": {"json": TEXT}}, "structured_outputs.json", "json", TEXT),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex", "regex", "a+"),
        ({"structured_outputs": {"grammar": "start: /a/"}}, "structured_outputs.grammar", "lark", "start: /a/"),
        ({"structured_outputs": {"choice": ["ä", "b"]}}, "structured_outputs.choice", "choice", '["ä", "b"]'),
        ({"guided_json": {}}, "guided_json", "json", "{}"),
        ({"guided_json": True}, "guided_json", "json", "true"),
        ({"guided_regex": "a", "response_format": {"type": "text"}}, "guided_regex", "regex", "a"),
        ({"guided_grammar": "start: /a/"}, "guided_grammar", "lark", "start: /a/"),
        ({"guided_choice": ["a"]}, "guided_choice", "choice", '["a"]'),
    ],
)
def test_every_spelling_becomes_one_specification(fields: dict[str, Any], param: str, kind: Any, text: str) -> None:
    found = plan(**fields)
    assert (found.param, found.spec) == (param, GrammarSpec(kind, text))


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"guided_choice": None}]
)
def test_nothing_asked_is_nothing(fields: dict[str, Any]) -> None:
    assert plan(**fields) is None


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, ("guided_regex", "guided_choice")),
        ({"structured_outputs": {"regex": "a", "json": {}}}, ("structured_outputs.json", "structured_outputs.regex")),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, ("response_format", "guided_json")),
    ],
)
def test_two_wishes_are_refused_by_both_names(fields: dict[str, Any], params: tuple[str, str]) -> None:
    with pytest.raises(InvalidValue) as caught:
        plan(**fields)
    assert f"{params[0]} and {params[1]} are given" in caught.value.message and caught.value.param == params[1]


@pytest.mark.parametrize(
    ("fields", "param", "rule"),
    [
        ({"guided_regex": ""}, "guided_regex", "must not be empty"),
        ({"guided_json": ""}, "guided_json", "must not be empty"),
        ({"guided_choice": []}, "guided_choice", "must not be empty"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar", "must not be empty"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice", f"at most {MAX_CHOICES}"),
        ({"guided_regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "guided_regex", f"at most {MAX_GRAMMAR_CHARS}"),
        ({"guided_json": {"enum": ["x" * MAX_GRAMMAR_CHARS]}}, "guided_json", f"at most {MAX_GRAMMAR_CHARS}"),
    ],
)
def test_empty_and_huge_ones_are_refused_by_name(fields: dict[str, Any], param: str, rule: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        plan(**fields)
    assert caught.value.param == param and rule in caught.value.message and len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "a"}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"guided_regex": "a", "num_beams": 2}, "guided_regex"),
    ],
)
def test_mistakes_are_400_by_name_on_both_endpoints(harness: MakeHarness, fields: dict[str, Any], param: str) -> None:
    async def scenario() -> None:
        async with harness() as h:
            for path, body in (("/v1/chat/completions", HELLO), ("/v1/completions", {"prompt": "a"})):
                response = await post(h, {**body, **fields}, path)
                error = response.json()["error"]
                assert (response.status_code, error["param"]) == (400, param), error
                assert param.partition(".")[0].partition("[")[0] in error["message"]
            assert not h.engine.added

    run_async(scenario())


def test_every_choice_of_every_prompt_has_the_grammar(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            response = await post(h, {"prompt": ["a", "b"], "n": 2, "guided_regex": "a+"}, "/v1/completions")
            assert response.status_code == 200
            assert len({sequence.params.grammar for sequence in h.engine.added}) == 1
            assert [sequence.grammar is not None for sequence in h.engine.added] == [True] * 4
            assert len({id(sequence.grammar) for sequence in h.engine.added}) == 4
            await post(h, HELLO)
            assert h.engine.added[-1].params.grammar is None

    run_async(scenario())


def test_a_prompt_that_is_only_scored_has_no_output_to_be_like_anything(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            body = {"prompt": "a", "echo": True, "max_tokens": 0, "logprobs": 0, "guided_regex": "a+"}
            response = await post(h, body, "/v1/completions")
            assert response.status_code == 400 and response.json()["error"]["param"] == "guided_regex"

    run_async(scenario())
