"""Recordings to text, with a script for what each window says: order, fallback, silence, languages, cancelling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.errors import RequestTimeout
from runtime.transcriber import Transcriber
from runtime.transcription import (
    Finished,
    Recording,
    Segment,
    SequentialChunking,
    TranscriptionEvent,
    TranscriptionRequest,
)
from tests.runtime.scripted_speech import (
    IDS,
    MODEL,
    Said,
    ScriptedAudio,
    ScriptedSequences,
    at,
    says,
    seconds,
    start_of,
    transcriber,
)

# Three windows with pauses between them, at offsets that are no multiple of anything.
CUTS = [(seconds(1) + 7, seconds(20)), (seconds(25) + 3, seconds(50)), (seconds(50) + 1, seconds(70))]
AUDIO = str(seconds(75)).encode()
NAMES = {CUTS[0][0]: "one", CUTS[1][0]: "two", CUTS[2][0]: "three"}
REPEATED = says("fox " * 60)


def name_of(start: int, temperature: float) -> Said:
    return Said([at(0), *says(NAMES[start]), at(4.5)])


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await coroutine

    asyncio.run(bounded())


@asynccontextmanager
async def closing(made: Transcriber) -> AsyncIterator[Transcriber]:
    try:
        yield made
    finally:
        made.close()
        assert made.num_windows_in_flight == 0


async def events(
    sequences: ScriptedSequences, audio: ScriptedAudio, made: dict[str, Any] | None = None, **fields: Any
) -> list[TranscriptionEvent]:
    async with closing(transcriber(sequences, audio, **(made or {}))) as one:
        request = TranscriptionRequest(AUDIO, **fields)
        found = [event async for event in one.transcribe(request)]
    assert len(asyncio.all_tasks()) == 1
    assert sequences.num_running == 0
    assert isinstance(found[0], Recording) and isinstance(found[-1], Finished)
    assert all(isinstance(event, Segment) for event in found[1:-1])
    return found


def segments(found: list[TranscriptionEvent]) -> list[Segment]:
    return [event for event in found if isinstance(event, Segment)]


def texts(found: list[TranscriptionEvent]) -> list[str]:
    return [segment.text for segment in segments(found)]


def test_windows_come_in_order_however_they_are_done() -> None:
    async def scenario() -> None:
        begun = {start: asyncio.Event() for start, _ in CUTS}
        later = {CUTS[0][0]: CUTS[1][0], CUTS[1][0]: CUTS[2][0], CUTS[2][0]: CUTS[2][0]}

        async def after_the_next(start: int) -> None:
            if later[start] != start:
                await begun[later[start]].wait()
            begun[start].set()

        sequences = ScriptedSequences(name_of, before=after_the_next)
        found = await events(sequences, ScriptedAudio(CUTS), language="en")
        assert texts(found) == [" one", " two", " three"]
        assert sequences.most_running == 3
        assert found[0] == Recording(75.0, "en", 3)
        assert found[-1] == Finished(sum(len(says(name)) + 3 for name in NAMES.values()), 0)

    run(scenario())


def test_times_are_exact_to_a_sample_and_never_after_the_window() -> None:
    async def scenario() -> None:
        def say(start: int, _: float) -> Said:
            return Said([at(0.5), *says("a"), at(1.5), at(1.5), *says("b"), at(29)])

        found = segments(await events(ScriptedSequences(say), ScriptedAudio(CUTS), language="en"))
        assert [(s.start_s, s.end_s) for s in found] == [
            time
            for start, end in CUTS
            for time in (
                ((start + seconds(0.5)) / 16_000, (start + seconds(1.5)) / 16_000),
                ((start + seconds(1.5)) / 16_000, end / 16_000),
            )
        ]
        assert [s.seek for s in found] == [start // 160 for start, _ in CUTS for _ in range(2)]
        assert found[0].token_ids == (at(0.5), *says("a"), at(1.5))

    run(scenario())


def test_only_so_many_windows_of_a_request_are_in_the_engine() -> None:
    async def scenario() -> None:
        cuts = [(seconds(n), seconds(n + 1)) for n in range(40)]
        six_run = asyncio.Event()

        async def until_six_run(_: int) -> None:
            if sequences.num_running == 6:
                six_run.set()
            await six_run.wait()

        sequences = ScriptedSequences(
            lambda start, _: Said([at(0), *says(f"w{start // 16_000}"), at(1)]), before=until_six_run
        )
        found = await events(sequences, ScriptedAudio(cuts), {"max_windows": 6}, language="en")
        assert texts(found) == [f" w{n}" for n in range(40)]
        assert sequences.most_running == 6

    run(scenario())


def test_the_first_sequence_has_the_requests_place_in_the_queue_and_later_ones_their_own() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(name_of)
        await events(sequences, ScriptedAudio(CUTS), {"max_windows": 1}, priority=3, cache_salt=b"salt")
        first, *others = sequences.requests
        assert first.submitted_time_s is None
        places = [request.submitted_time_s for request in others]
        assert None not in places and places == sorted(places, key=lambda place: place or 0)
        assert {request.arrival_time_s for request in others} == {first.arrival_time_s}
        assert {(request.priority, request.cache_salt) for request in sequences.requests} == {(3, b"salt")}
        assert all(place is not None and place >= first.arrival_time_s for place in places)

    run(scenario())


def test_a_window_that_repeats_itself_is_tried_hotter_until_it_does_not() -> None:
    async def scenario() -> None:
        def say(start: int, temperature: float) -> Said:
            if start == CUTS[1][0] and temperature < 0.5:
                return Said([at(0), *REPEATED, at(4)])
            return name_of(start, temperature)

        sequences = ScriptedSequences(say)
        found = await events(sequences, ScriptedAudio(CUTS), language="en", seed=5)
        assert texts(found) == [" one", " two", " three"]
        assert [s.temperature for s in segments(found)] == [0.0, 0.6, 0.0]
        assert isinstance(found[-1], Finished) and found[-1].num_fallbacks == 3
        tries = [request for request in sequences.windows() if start_of(request) == CUTS[1][0]]
        assert [r.params.temperature for r in tries] == [0.0, 0.2, 0.4, 0.6]
        assert len({r.params.seed for r in sequences.windows()}) == 6
        assert len({r.source.key for r in tries if r.source is not None}) == 1  # the encoder ran once
        assert len({r.submitted_time_s for r in tries}) == 1  # and the window keeps its place
        assert [r.params.probe is not None for r in tries] == [True, False, False, False]
        assert found[-1].num_tokens == sum(len(says(n)) + 3 for n in NAMES.values()) + 3 * (len(REPEATED) + 3)

    run(scenario())


def test_the_last_try_stands_however_bad_it_is() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(lambda start, _: Said([at(0), *says("mumble"), at(4)], logprob=-2.0))
        found = await events(sequences, ScriptedAudio(CUTS[:1]), language="en")
        assert texts(found) == [" mumble"]
        assert segments(found)[0].temperature == 1.0
        assert segments(found)[0].avg_logprob == pytest.approx(-2.0)
        assert len(sequences.windows()) == 6

    run(scenario())


def test_a_temperature_that_was_asked_for_is_the_only_one() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(lambda start, _: Said([at(0), *REPEATED, at(4)]))
        await events(sequences, ScriptedAudio(CUTS[:1]), language="en", temperature=0.3)
        assert [r.params.temperature for r in sequences.windows()] == [0.3]

    run(scenario())


def test_silence_gives_no_text_and_needs_no_second_try() -> None:
    async def scenario() -> None:
        def say(start: int, temperature: float) -> Said:
            if start == CUTS[0][0]:
                return Said([at(0), *says("Thank you."), at(2)], logprob=-1.5, no_speech=0.7)
            return name_of(start, temperature)

        sequences = ScriptedSequences(say)
        found = await events(sequences, ScriptedAudio(CUTS), language="en", has_words=True)
        assert texts(found) == [" two", " three"]
        assert isinstance(found[-1], Finished) and found[-1].num_fallbacks == 0

    run(scenario())


def test_sure_words_are_kept_though_silence_was_expected() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(lambda *_: Said([at(0), *says("hello"), at(2)], logprob=-0.5, no_speech=0.9))
        found = await events(sequences, ScriptedAudio(CUTS[:1]), language="en")
        assert texts(found) == [" hello"]
        assert segments(found)[0].no_speech_prob == 0.9

    run(scenario())


def test_a_recording_without_speech_is_empty_and_asks_the_engine_nothing() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(name_of)
        assert await events(sequences, ScriptedAudio([])) == [Recording(75.0, None, 0), Finished(0, 0)]
        assert sequences.requests == []

    run(scenario())


def test_windows_that_say_nothing_give_no_segments() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(lambda *_: Said([at(0), IDS["Ġ"], at(1)]))
        assert texts(await events(sequences, ScriptedAudio(CUTS), language="en", has_words=True)) == []
        assert all(r.params.max_tokens > 0 for r in sequences.requests)

    run(scenario())


def test_sequential_windows_begin_where_the_last_timestamps_end() -> None:
    async def scenario() -> None:
        script = {
            0: [at(0), *says("a"), at(10), at(10), *says("cut o"), at(29), at(29.0)],
            seconds(29): [at(0), *says("b"), at(3), at(3), *says("unfinished")],
            seconds(32): [at(0), *says("c"), at(12)],
            seconds(62): [*says("no moments")],
        }
        sequences = ScriptedSequences(lambda start, _: Said(script[start]))
        audio = ScriptedAudio()
        found = await events(
            sequences, audio, language="en", prompt="Zaphod", has_timestamps=False, chunking=SequentialChunking()
        )
        assert found[0] == Recording(75.0, "en", 3)
        assert [(s.text, s.start_s, s.end_s, s.seek) for s in segments(found)] == [
            (" a", 0.0, 10.0, 0),
            (" cut o", 10.0, 29.0, 0),
            (" b", 29.0, 32.0, 2900),
            (" c", 32.0, 44.0, 3200),
            (" no moments", 62.0, 75.0, 6200),
        ]
        assert sequences.most_running == 1
        # Moments are needed to go on by, whether or not anybody wants to see them; the prompt is there every time.
        assert {tuple(r.prompt_token_ids[-3:]) for r in sequences.windows()} == {
            (MODEL.start_id, IDS["<|en|>"], IDS["<|transcribe|>"])
        }
        assert all(r.prompt_token_ids[0] == IDS["<|startofprev|>"] for r in sequences.windows())

    run(scenario())


def test_a_sequential_window_that_gets_nowhere_is_left() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(lambda start, _: Said([at(0), *says("a"), at(0), at(0)]))
        found = await events(sequences, ScriptedAudio(), language="en", chunking=SequentialChunking())
        assert texts(found) == [" a"] * 3

    run(scenario())


def test_words_have_their_times_in_the_recording() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(lambda start, _: Said([at(0), *says("fox dog"), at(2), at(2), *says("one")]))
        found = segments(await events(sequences, ScriptedAudio(CUTS), language="en", has_words=True))
        assert [[word.text for word in s.words or ()] for s in found] == [[" fox", " dog"], [" one"]] * 3
        for index, (start, _) in enumerate(CUTS):
            first, second = found[2 * index].words or (), found[2 * index + 1].words or ()
            num = len(says("fox"))
            assert first[0].start_s == pytest.approx(start / 16_000)
            assert first[1].start_s == pytest.approx(start / 16_000 + 0.1 * num)
            assert second[0].start_s == pytest.approx(start / 16_000 + 0.1 * len(says("fox dog")))
        aligned = [r for r in sequences.requests if r.params.is_aligning]
        assert {tuple(r.prompt_token_ids) for r in aligned} == {
            (
                MODEL.start_id, IDS["<|en|>"], IDS["<|transcribe|>"], IDS["<|notimestamps|>"],
                *says("fox dog"), *says("one"), MODEL.end_id,
            )
        }  # fmt: skip
        assert all(r.params.max_tokens == 0 for r in aligned)

    run(scenario())


def test_seeds_are_the_requests_and_differ_by_window_and_try() -> None:
    async def scenario() -> None:
        def script(start: int, temperature: float) -> Said:
            return Said([at(0), *REPEATED, at(1)])

        seeds = []
        for seed in (1, 1, 2, None, None):
            sequences = ScriptedSequences(script)
            await events(sequences, ScriptedAudio(CUTS), language="en", seed=seed)
            seeds.append({r.params.seed for r in sequences.windows()})
        assert seeds[0] == seeds[1] and len(seeds[0]) == 18
        assert not seeds[0] & seeds[2] and not seeds[3] & seeds[4]

    run(scenario())


def test_sources_are_shared_between_equal_windows_of_one_key_only() -> None:
    async def scenario() -> None:
        keys = []
        for salt in (b"a", b"a", b"b"):
            sequences = ScriptedSequences(name_of)
            await events(sequences, ScriptedAudio(CUTS), language="en", cache_salt=salt)
            keys.append({r.source.key for r in sequences.requests if r.source is not None})
        assert keys[0] == keys[1] and len(keys[0]) == 3
        assert not keys[0] & keys[2]

    run(scenario())


def test_closing_ends_every_window_and_leaves_no_task() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(name_of, before=lambda start: asyncio.sleep(0 if start == CUTS[0][0] else 60))
        async with closing(transcriber(sequences, ScriptedAudio(CUTS))) as one:
            stream = one.transcribe(TranscriptionRequest(AUDIO, language="en"))
            assert isinstance(await anext(stream), Recording)
            assert isinstance(await anext(stream), Segment)
            while sequences.num_running < 2:
                await asyncio.sleep(0.001)
            assert one.num_windows_in_flight == 2
            await stream.aclose()
            assert sequences.num_running == 0
            assert len(asyncio.all_tasks()) == 1

    run(scenario())


def test_a_caller_who_is_cancelled_while_waiting_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(name_of, before=lambda _: asyncio.sleep(60))
        async with closing(transcriber(sequences, ScriptedAudio(CUTS))) as one:

            async def read() -> None:
                stream = one.transcribe(TranscriptionRequest(AUDIO, language="en"))
                try:
                    async for _ in stream:
                        pass
                finally:
                    await stream.aclose()

            task = asyncio.create_task(read())
            while sequences.num_running < 3:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert sequences.num_running == 0
            assert len(asyncio.all_tasks()) == 1

    run(scenario())


def test_an_error_of_one_window_ends_all_after_what_comes_before_it() -> None:
    async def scenario() -> None:
        def say(start: int, temperature: float) -> Said:
            if start == CUTS[1][0]:
                raise RequestTimeout("too long")
            return name_of(start, temperature)

        sequences = ScriptedSequences(say)
        found = []
        async with closing(transcriber(sequences, ScriptedAudio(CUTS))) as one:
            with pytest.raises(RequestTimeout):
                async for event in one.transcribe(TranscriptionRequest(AUDIO, language="en")):
                    found.append(event)
        assert texts(found) == [" one"]
        assert sequences.num_running == 0 and len(asyncio.all_tasks()) == 1

    run(scenario())


def test_many_recordings_at_once_each_get_their_own() -> None:
    async def scenario() -> None:
        alone = texts(await events(ScriptedSequences(name_of), ScriptedAudio(CUTS)))
        sequences = ScriptedSequences(name_of, before=lambda start: asyncio.sleep(0.001 * (start % 7)))
        async with closing(transcriber(sequences, ScriptedAudio(CUTS))) as one:

            async def read() -> list[str]:
                return texts([event async for event in one.transcribe(TranscriptionRequest(AUDIO))])

            assert await asyncio.gather(*(read() for _ in range(16))) == [alone] * 16

    run(scenario())
