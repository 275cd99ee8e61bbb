"""The corpus of the demo model: repeatable, torch-free, true to the real options, right where it can be checked."""

from __future__ import annotations

import json
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config import Settings
from demo.corpus.conversation import is_held_out
from demo.corpus.mixture import generate, skill_names
from demo.corpus.server_facts import option_facts

_ROOT = Path(__file__).parents[2]


def test_the_same_seed_gives_the_same_chats_and_another_seed_others() -> None:
    first = list(generate(5, 300))
    assert first == list(generate(5, 300))
    assert first != list(generate(6, 300))


def test_the_generator_needs_no_torch() -> None:
    code = "import sys; from demo.corpus.mixture import generate; list(generate(1, 50)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("skill", skill_names())
def test_each_skill_makes_whole_chats_for_training_and_for_the_scores(skill: str) -> None:
    for held_out in (False, True):
        for chat in generate(9, 20, held_out=held_out, skill=skill):
            assert is_held_out(chat.key) == held_out
            roles = [message["role"] for message in chat.messages]
            assert roles[-1] == "assistant"
            assert set(roles) <= {"system", "user", "assistant", "tool"}
            assert all(message["content"] or message.get("tool_calls") for message in chat.messages)


def test_what_is_held_out_is_never_asked_in_training() -> None:
    held = {
        m["content"] for c in generate(1, 400, held_out=True, skill="count") for m in c.messages if m["role"] == "user"
    }
    seen = {m["content"] for c in generate(2, 4000) for m in c.messages if m["role"] == "user"}
    assert held
    assert not held & seen


def test_every_real_option_is_known_with_its_real_default() -> None:
    facts = {fact.flag: fact for fact in option_facts()}
    assert set(facts) == {"--" + name.replace("_", "-") for name in Settings.model_fields}
    assert facts["--port"].default == str(Settings.model_fields["port"].default)
    assert facts["--host"].variable == "HOSTNAME"


def test_extraction_answers_are_json_that_the_text_supports() -> None:
    for skill in ("fields", "schema", "extract_system"):
        for chat in generate(3, 200, skill=skill):
            answer = json.loads(chat.messages[-1]["content"])
            said = " ".join(message["content"] for message in chat.messages[:-1])
            for value in answer.values():
                assert value is None or isinstance(value, bool) or str(value) in said


def test_sums_come_out_right() -> None:
    operators = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    num_sums = 0
    for chat in generate(4, 500, skill="sums"):
        for a, sign, b, result in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", chat.messages[-1]["content"]):
            num_sums += 1
            assert operators[sign](int(a), int(b)) == int(result)
    assert num_sums > 500


def test_calls_name_an_offered_tool_and_its_arguments() -> None:
    num_calls = 0
    for chat in generate(8, 300, skill="tools"):
        offered = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in chat.tools}
        for message in chat.messages:
            for call in message.get("tool_calls", ()):
                num_calls += 1
                assert set(call["function"]["arguments"]) == set(offered[call["function"]["name"]])
    assert num_calls > 200
