"""What windows are told before they are written down: language, task, prompt, and the rules of the checkpoint."""

from __future__ import annotations

import pytest

from engine.errors import InvalidValue, UnsupportedParameter
from runtime.transcription import (
    Recording,
)
from tests.runtime.scripted_speech import (
    ENGLISH_MODEL,
    IDS,
    MODEL,
    Said,
    ScriptedAudio,
    ScriptedSequences,
    says,
)
from tests.runtime.test_transcriber import CUTS, NAMES, events, name_of, run, segments


def test_the_language_is_that_of_the_first_window_with_speech_and_heard_once() -> None:
    async def scenario() -> None:
        heard = {CUTS[0][0]: ("zh", 0.9), CUTS[1][0]: ("de", 0.1), CUTS[2][0]: ("es", 0.05)}
        audio = ScriptedAudio(CUTS)
        sequences = ScriptedSequences(name_of, hears=heard.__getitem__)
        found = await events(sequences, audio)
        assert found[0] == Recording(75.0, "de", 3)
        assert [r.prompt_token_ids for r in sequences.requests[:2]] == [[MODEL.start_id]] * 2
        assert sequences.requests[0].params.token_rules is not None
        assert set(sequences.requests[0].params.token_rules.allowed or ()) == set(MODEL.language_ids.values())
        assert {tuple(r.prompt_token_ids) for r in sequences.windows()} == {
            (MODEL.start_id, IDS["<|de|>"], IDS["<|transcribe|>"])
        }
        assert len(sequences.requests) == 5
        assert audio.num_features == 3  # what was heard for its language is not made anew

    run(scenario())


def test_where_all_is_silence_the_least_silent_window_tells_the_language() -> None:
    async def scenario() -> None:
        heard = {CUTS[0][0]: ("zh", 0.9), CUTS[1][0]: ("de", 0.7), CUTS[2][0]: ("es", 0.8)}
        found = await events(ScriptedSequences(name_of, hears=heard.__getitem__), ScriptedAudio(CUTS))
        assert isinstance(found[0], Recording) and found[0].language == "de"

    run(scenario())


@pytest.mark.parametrize("language", ["de", "DE", "German", " german "])
def test_a_language_may_be_given_by_code_or_name(language: str) -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(name_of)
        found = await events(sequences, ScriptedAudio(CUTS), language=language, task="translate")
        assert isinstance(found[0], Recording) and found[0].language == "de"
        assert {tuple(r.prompt_token_ids) for r in sequences.requests} == {
            (MODEL.start_id, IDS["<|de|>"], IDS["<|translate|>"])
        }

    run(scenario())


def test_the_prompt_stands_before_every_window_and_silence_is_probed_where_the_transcript_begins() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(name_of)
        await events(sequences, ScriptedAudio(CUTS), language="en", prompt="Zaphod <|en|> " * 200)
        for request in sequences.windows():
            ids = request.prompt_token_ids
            assert ids[0] == IDS["<|startofprev|>"]
            assert ids[224:] == [MODEL.start_id, IDS["<|en|>"], IDS["<|transcribe|>"]]
            assert max(ids[1:224]) < MODEL.end_id
            assert request.params.max_tokens == 448 - 227
            assert request.params.probe is not None
            assert (request.params.probe.position, request.params.probe.token_ids) == (224, (IDS["<|nospeech|>"],))

    run(scenario())


def test_without_timestamps_a_window_is_one_segment() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(lambda start, _: Said(says(NAMES[start])))
        found = segments(await events(sequences, ScriptedAudio(CUTS), language="en", has_timestamps=False))
        assert [(s.start_s, s.end_s) for s in found] == [(start / 16_000, end / 16_000) for start, end in CUTS]
        assert all(r.prompt_token_ids[-1] == IDS["<|notimestamps|>"] for r in sequences.windows())
        assert all(r.params.token_rules.timestamps is None for r in sequences.windows() if r.params.token_rules)

    run(scenario())


def test_the_rules_of_the_checkpoint_bind_every_window() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(name_of)
        await events(sequences, ScriptedAudio(CUTS), language="en")
        rules = sequences.windows()[0].params.token_rules
        assert rules is not None and rules.timestamps is not None
        assert rules.suppressed == MODEL.suppressed_ids and rules.suppressed_first == MODEL.suppressed_first_ids
        assert rules.timestamps.first_id == IDS["<|0.00|>"] and rules.timestamps.max_initial_index == 50
        assert rules.timestamps.end_of_text_id == IDS["<|endoftext|>"]

    run(scenario())


def test_a_model_of_english_alone_is_told_no_language_and_no_task() -> None:
    async def scenario() -> None:
        sequences = ScriptedSequences(name_of)
        found = await events(sequences, ScriptedAudio(CUTS), {"model": ENGLISH_MODEL})
        assert isinstance(found[0], Recording) and found[0].language == "en"
        assert {tuple(r.prompt_token_ids) for r in sequences.requests} == {(MODEL.start_id,)}
        await events(sequences, ScriptedAudio(CUTS), {"model": ENGLISH_MODEL}, language="English")
        for fields, kind in (({"language": "de"}, InvalidValue), ({"task": "translate"}, UnsupportedParameter)):
            with pytest.raises(kind, match="English alone"):
                await events(sequences, ScriptedAudio(CUTS), {"model": ENGLISH_MODEL}, **fields)

    run(scenario())


def test_a_language_the_model_does_not_know_is_refused_before_anything_is_decoded() -> None:
    async def scenario() -> None:
        audio = ScriptedAudio(CUTS)
        with pytest.raises(InvalidValue, match=r"language is 'xx': this model knows de, en, es, ms, zh") as caught:
            await events(ScriptedSequences(name_of), audio, language="xx")
        assert caught.value.param == "language"
        assert audio.decoded == 0

    run(scenario())
