"""No field is dropped in silence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import MakeHarness, run_async
from tests.api.test_chat import HELLO, post


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("prediction", {"type": "content", "content": "x"}),
        ("best_of", 2),
        ("best_of", True),
        ("suffix", "x"),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("moderation", {"model": "x"}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(harness: MakeHarness, name: str, value: Any) -> None:
    async def scenario() -> None:
        async with harness() as h:
            for path, body in (("/v1/chat/completions", HELLO), ("/v1/completions", {"prompt": "a"})):
                response = await post(h, {**body, name: value}, path)
                error = response.json()["error"]
                assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)

    run_async(scenario())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", []),
        ("tool_choice", "none"),
        ("functions", []),
        ("function_call", "none"),
        ("response_format", {"type": "text"}),
        ("structured_outputs", {}),
        ("structured_outputs", {"regex": None}),
        ("guided_json", None),
        ("best_of", 1),
        ("suffix", ""),
        ("modalities", ["text"]),
        ("store", False),
        ("stream_options", {}),
    ],
)
def test_values_that_ask_for_nothing_are_accepted(harness: MakeHarness, name: str, value: Any) -> None:
    async def scenario() -> None:
        async with harness(strict_parameters=True) as h:
            response = await post(h, {**HELLO, name: value})
            assert response.status_code == 200 and "x-ignored-parameters" not in response.headers

    run_async(scenario())


def test_fields_without_effect_and_unknown_fields_are_named(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            fields = {"store": True, "prompt_cache_key": "k", "colour": 1, "parallel_tool_calls": True}
            fields["structured_outputs"] = {"tempo": 1}
            fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "tone": 2}, "hue": 3}
            options = {"stream": True, "stream_options": {"include_obfuscation": True, "pace": 2}}
            for body in ({**HELLO, **fields}, {**HELLO, **fields, **options}):
                response = await post(h, body)
                expected = {*fields} - {"structured_outputs", "response_format"}
                expected |= {"structured_outputs.tempo", "response_format.json_schema.tone", "response_format.hue"}
                if "stream" in body:
                    expected |= {"stream_options.include_obfuscation", "stream_options.pace"}
                assert set(response.headers["x-ignored-parameters"].split(", ")) == expected

    run_async(scenario())


def test_unknown_fields_are_400_when_strict_and_known_ones_are_not(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness(strict_parameters=True) as h:
            response = await post(h, {**HELLO, "colour": None})
            assert response.status_code == 400 and response.json()["error"]["param"] == "colour"
            response = await post(h, {**HELLO, "stream": True, "stream_options": {"pace": 1}})
            assert response.status_code == 400
            response = await post(h, {**HELLO, "store": True})
            assert response.status_code == 200 and response.headers["x-ignored-parameters"] == "store"

    run_async(scenario())


def test_a_fields_name_cannot_become_a_header(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            names = {"a\r\nset-cookie: b": 1, "ü" * 500: 2, **{f"f{i}": 0 for i in range(5000)}}
            response = await post(h, {**HELLO, **names})
            assert response.status_code == 200 and "set-cookie" not in response.headers
            assert len(response.headers["x-ignored-parameters"]) < 4000
            assert response.headers["x-ignored-parameters"].endswith("more")

    run_async(scenario())
