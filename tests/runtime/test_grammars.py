"""Grammars compiled off the event loop: kept, shared, and refused when they would cost the server too much."""

from __future__ import annotations

import asyncio
import json
import string
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from runtime.grammar_trials import GrammarTrials
from runtime.grammars import MAX_KEPT, Grammars
from tests.text.vocabularies import byte_level, unigram
from text.errors import GrammarError
from text.grammar import GrammarSpec, grammar_source
from text.grammar_vocabulary import read_vocabulary

# Each pattern more doubles what the compiler takes.
PATTERNS = [{"type": "string", "pattern": f".*{letter}.*"} for letter in string.ascii_letters]
BOMB = GrammarSpec("json", json.dumps({"allOf": PATTERNS[:40]}))
# Each rule leads to the next: as deep as there are rules.
RULES = [f'r{n}: "a"* r{n + 1}?' for n in range(3000)]
CHAIN = GrammarSpec("lark", "\n".join(["start: " + " | ".join(f"r{n}" for n in range(3000)), *RULES, 'r3000: "b"']))
DIGIT = GrammarSpec("regex", "[0-9]")


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    tokenizer = byte_level()
    made = Grammars(tokenizer, len(tokenizer), {tokenizer.eos_token_id})
    yield made
    made.close()


@pytest.fixture
def make_trials() -> Iterator[Callable[[float], GrammarTrials]]:
    tokenizer = byte_level()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), {tokenizer.eos_token_id})
    made: list[GrammarTrials] = []

    def make(time_limit_s: float) -> GrammarTrials:
        made.append(GrammarTrials(vocabulary, time_limit_s=time_limit_s))
        return made[-1]

    yield make
    for trials in made:
        trials.close()


def source(spec: GrammarSpec) -> str:
    return grammar_source(spec, drops_first_space=False)


def test_a_grammar_is_compiled_once_and_the_latest_are_kept(grammars: Grammars) -> None:
    async def scenario() -> None:
        first = await grammars.get(DIGIT, [1])
        assert await grammars.get(GrammarSpec("regex", "[0-9]"), [1, 2]) is first
        together = await asyncio.gather(*(grammars.get(GrammarSpec("regex", "abc"), [1]) for _ in range(5)))
        assert len({id(grammar) for grammar in together}) == 1
        for number in range(MAX_KEPT):
            await grammars.get(GrammarSpec("regex", f"a{number}"), [1])
        assert await grammars.get(DIGIT, [1]) is not first

    asyncio.run(scenario())


def test_a_prompt_decides_whether_the_first_space_counts() -> None:
    tokenizer = unigram()
    grammars = Grammars(tokenizer, len(tokenizer), {tokenizer.eos_token_id})

    async def scenario() -> None:
        beginning = await grammars.get(DIGIT_OR_LETTER, [tokenizer.bos_token_id])
        later = await grammars.get(DIGIT_OR_LETTER, tokenizer.encode("a"))
        assert beginning is not later

    DIGIT_OR_LETTER = GrammarSpec("regex", "[0-9a-z]+")
    asyncio.run(scenario())
    grammars.close()


def test_what_is_refused_leaves_the_rest_as_it_was(grammars: Grammars) -> None:
    async def scenario() -> None:
        with pytest.raises(GrammarError, match="unclosed group"):
            await grammars.get(GrammarSpec("regex", "("), [1])
        with pytest.raises(GrammarError, match="nested too deep"):
            await grammars.get(CHAIN, [1])
        await grammars.get(DIGIT, [1])

    asyncio.run(scenario())


def test_the_event_loop_goes_on_while_a_hostile_grammar_is_tried(grammars: Grammars) -> None:
    async def scenario() -> None:
        await grammars.get(DIGIT, [1])
        assert grammars._trials is not None
        grammars._trials._time_limit_s = 0.5
        task = asyncio.create_task(grammars.get(BOMB, [1]))
        worst_s = 0.0
        while not task.done():
            began_s = time.perf_counter()
            await asyncio.sleep(0.005)
            worst_s = max(worst_s, time.perf_counter() - began_s)
        with pytest.raises(GrammarError, match=r"more than 0\.5 s"):
            await task
        assert worst_s < 0.25

    asyncio.run(scenario())


def test_time_is_bounded_and_the_process_starts_again(make_trials: Callable[[float], GrammarTrials]) -> None:
    trials = make_trials(0.5)
    trials.check(source(DIGIT))
    began_s = time.perf_counter()
    with pytest.raises(GrammarError, match=r"more than 0\.5 s"):
        trials.check(source(BOMB))
    assert time.perf_counter() - began_s < 5
    trials.check(source(DIGIT))


def test_memory_and_stack_are_bounded(make_trials: Callable[[float], GrammarTrials]) -> None:
    trials = make_trials(60.0)
    before = psutil.Process().memory_info().rss
    for spec in (CHAIN, BOMB):
        with pytest.raises(GrammarError):
            trials.check(source(spec))
        trials.check(source(DIGIT))
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_a_process_that_was_killed_is_started_again(make_trials: Callable[[float], GrammarTrials]) -> None:
    trials = make_trials(5.0)
    trials.check(source(DIGIT))
    process = trials._process
    assert process is not None
    process.kill()
    process.wait()
    trials.check(source(DIGIT))
    assert trials._process is not process


def test_nothing_is_left_after_closing(make_trials: Callable[[float], GrammarTrials]) -> None:
    trials = make_trials(5.0)
    trials.check(source(DIGIT))
    process = trials._process
    trials.close()
    assert process is not None and process.returncode is not None
    trials.close()
