"""Beam search gives the sequences and scores of generate(num_beams=...)."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import RequestTimeout
from engine.model.loader import describe
from engine.sequence import SamplingParams, SequenceOutput, Source, TokenLogprobs
from runtime.beam_search import BeamResult, beam_search
from runtime.beams import BeamParams, Beams, EarlyStopping
from runtime.generation import GenerationRequest
from tests import zoo_seq2seq
from tests.engine.harness import engine_for, tiny_model
from tests.runtime.engine_sequences import EngineSequences
from tests.zoo import VOCAB_SIZE, prompt

Found = list[tuple[list[int], float]]


def expected(model: Any, inputs: dict[str, Any], num_tokens: int, num_prompt: int, **options: Any) -> Found:
    """Sequences without padding, and scores, of generate()."""
    ends = options.get("eos_token_id") or []
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=num_tokens,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
        num_return_sequences=options["num_beams"],
        **options,
    )
    found = []
    for ids, score in zip(output.sequences[:, num_prompt:].tolist(), output.sequences_scores.tolist(), strict=True):
        end = next((index + 1 for index, token_id in enumerate(ids) if token_id in ends), len(ids))
        found.append((ids[:end], score))
    return found


def given(result: BeamResult) -> Found:
    return [(list(one.token_ids), one.score) for one in result.hypotheses]


def same(found: Found, wanted: Found) -> bool:
    return [ids for ids, _ in found] == [ids for ids, _ in wanted] and [score for _, score in found] == pytest.approx(
        [score for _, score in wanted], rel=1e-4, abs=1e-4
    )


def seq2seq_engine(name: str) -> Engine:
    config = EngineConfig(max_num_seqs=8, max_batch_tokens=256, max_model_len=128, max_source_len=128)
    return build_engine(describe(zoo_seq2seq.make(name)), config, lambda _what, _share: None)


def search(engine: Engine, request: GenerationRequest, params: BeamParams, ends: list[int]) -> BeamResult:
    return asyncio.run(beam_search(EngineSequences(engine).generate, request, params, frozenset(ends)))


def likely_ends(model: Any, inputs: dict[str, Any], num_prompt: int) -> list[int]:
    """Tokens that beams meet early, so that some sequences end soon and others late."""
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12, num_beams=3, num_return_sequences=3)
    tokens = output[:, num_prompt + 3 :].flatten().tolist()
    return sorted(set(tokens), key=tokens.index)[:2]


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_decoders_find_what_generate_finds(name: str, num_beams: int) -> None:
    model = tiny_model(name)
    engine = engine_for(name)
    num_ended = 0
    for seed, length in enumerate((3, 40)):
        ids = prompt(length, seed=seed)
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, length, dtype=torch.long)}
        for ends in ([], likely_ends(model, inputs, length)):
            wanted = expected(model, inputs, 20, length, num_beams=num_beams, eos_token_id=ends or None)
            request = GenerationRequest(ids, SamplingParams(max_tokens=20))
            result = search(engine, request, BeamParams(num_beams, num_return_sequences=num_beams), ends)
            assert same(given(result), wanted)
            num_ended += sum(len(found) < 20 for found, _ in wanted)
    assert num_ended > 0
    assert not engine.has_work()


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100"])
def test_encoder_decoders_find_what_generate_finds(name: str, num_beams: int) -> None:
    model = zoo_seq2seq.make(name)
    engine = seq2seq_engine(name)
    for seed, length in enumerate((5, 30)):
        ids = prompt(length, seed=seed)
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, length, dtype=torch.long)}
        for ends in ([], likely_ends(model, inputs, 1)):
            wanted = expected(model, inputs, 16, 1, num_beams=num_beams, eos_token_id=ends or None)
            source = Source(repr(ids).encode(), length, tuple(ids))
            request = GenerationRequest([zoo_seq2seq.START_ID], SamplingParams(max_tokens=16), source=source)
            result = search(engine, request, BeamParams(num_beams, num_return_sequences=num_beams), ends)
            assert same(given(result), wanted)


def run_on(model: Any, ids: list[int], beams: Beams) -> Found:
    """Drives the bookkeeping with the model's own log-probabilities."""
    while not beams.is_over:
        rows = torch.tensor([[*ids, *beam.token_ids] for beam in beams.live])
        with torch.inference_mode():
            logprobs = model(rows).logits[:, -1].double().log_softmax(-1)
        top = logprobs.topk(beams.num_wanted)
        beams.advance([
            list(zip(tokens, values, strict=True))
            for tokens, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ])  # fmt: skip
    return [(list(one.token_ids), one.score) for one in beams.best]


STOPPINGS: list[EarlyStopping] = [True, False, "never"]
OPTIONS = list(itertools.product([2, 3, 5], [0.0, 1.0, 2.5, -1.0], STOPPINGS))


@pytest.mark.parametrize("seed", range(2))
def test_every_stopping_rule_and_length_penalty_is_generates(seed: int) -> None:
    model = tiny_model("llama")
    ids = prompt(6, seed=seed)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    ends = likely_ends(model, inputs, 6)
    lengths = set()
    for num_beams, length_penalty, early_stopping in random.Random(seed).sample(OPTIONS, 9):
        for num_ends, min_tokens in ((1, 0), (2, 0), (2, 6)):
            wanted = expected(
                model, inputs, 16, 6, num_beams=num_beams, eos_token_id=ends[:num_ends], length_penalty=length_penalty,
                early_stopping=early_stopping, min_new_tokens=min_tokens or None,
            )  # fmt: skip
            params = BeamParams(num_beams, length_penalty, early_stopping, num_return_sequences=num_beams)
            found = run_on(model, ids, Beams(params, frozenset(ends[:num_ends]), 16, min_tokens))
            assert same(found, wanted), (num_beams, length_penalty, early_stopping, num_ends, min_tokens)
            lengths |= {len(found_ids) for found_ids, _ in found}
    assert len(lengths) >= 3


def test_a_forced_beginning_counts_in_the_length_as_it_does_in_generate() -> None:
    model = zoo_seq2seq.make("m2m_100")
    ids, forced = prompt(9, seed=4), 17
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    ends = likely_ends(model, inputs, 1)
    wanted = expected(
        model, inputs, 13, 2, num_beams=3, eos_token_id=ends, forced_bos_token_id=forced, length_penalty=2.0
    )
    engine = seq2seq_engine("m2m_100")
    source = Source(b"source", 9, tuple(ids))
    request = GenerationRequest([zoo_seq2seq.START_ID, forced], SamplingParams(max_tokens=12), source=source)
    result = search(engine, request, BeamParams(3, 2.0, num_return_sequences=3, num_forced_tokens=1), ends)
    assert same(given(result), wanted)


def test_only_the_best_are_given_and_requests_keep_their_place() -> None:
    sequences = EngineSequences(engine_for("llama"))
    request = GenerationRequest(
        prompt(50), SamplingParams(max_tokens=6, seed=3), priority=2, cache_salt=b"s", arrival_time_s=5.0
    )
    result = asyncio.run(beam_search(sequences.generate, request, BeamParams(4, num_return_sequences=2), frozenset()))
    assert len(result.hypotheses) == 2
    assert [one.submitted_time_s for one in sequences.requests] == [None] + [5.0] * 20
    assert {(one.priority, one.cache_salt, one.params.max_tokens) for one in sequences.requests} == {(2, b"s", 1)}
    assert sequences.num_steps == 6  # the beams of a step share one of the engine's
    assert result.num_cached_tokens == 0


def test_stop_tokens_end_sequences_and_the_models_own_end_can_be_ignored() -> None:
    model = tiny_model("llama")
    ids = prompt(6, seed=1)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    ends = likely_ends(model, inputs, 6)
    params = SamplingParams(max_tokens=16, stop_token_ids=frozenset(ends[:1]), ignore_eos=True)
    result = search(
        engine_for("llama"), GenerationRequest(ids, params), BeamParams(3, num_return_sequences=3), ends[1:]
    )
    assert same(given(result), expected(model, inputs, 16, 6, num_beams=3, eos_token_id=ends[:1]))


def test_a_failing_beam_ends_all() -> None:
    running: set[int] = set()

    async def generate(request: GenerationRequest) -> Any:
        number = len(request.prompt_token_ids) * VOCAB_SIZE + request.prompt_token_ids[-1]
        running.add(number)
        try:
            if len(request.prompt_token_ids) == 2:
                if request.prompt_token_ids[-1] == 1:
                    raise RequestTimeout("too long")
                await asyncio.sleep(60)
            top = tuple((token_id, -0.1 - token_id) for token_id in range(request.params.num_logprobs or 0))
            yield SequenceOutput(0, (0,), logprobs=(TokenLogprobs(-0.1, top),), finish_reason="length")
        finally:
            running.discard(number)

    async def scenario() -> None:
        request = GenerationRequest([9], SamplingParams(max_tokens=5))
        with pytest.raises(RequestTimeout):
            await beam_search(generate, request, BeamParams(3), frozenset())
        assert not running and len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())
