"""Encoder-decoders give the tokens of generate(), whatever shares the batch, in either lane."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ContextLengthExceeded, InvalidValue
from engine.kv.encoder_decoder import EncoderDecoderKV
from engine.model import linear
from engine.model.loader import describe, pack_weights
from engine.model.packed_linear import PackedLinear
from engine.model.seq2seq import Seq2SeqRunner
from engine.sequence import PromptProbe, SamplingParams, Sequence, Source, TimestampRules, TokenRules
from tests import zoo_seq2seq as zoo
from tests.engine.harness import drive, greedy, tokens
from tests.zoo import prompt
from tests.zoo_seq2seq import is_diverse

LENGTHS = (5, 40, 17, 3, 61, 1, 24, 33)
NUM_TOKENS = 28  # beyond the distance at which T5's buckets end

_models: dict[str, Any] = {}


def model_of(name: str) -> Any:
    if name not in _models:
        _models[name] = zoo.make_whisper() if name == "whisper" else zoo.make(name)
    return copy.deepcopy(_models[name])


def engine_of(name: str, *, is_packed: bool = False, **limits: Any) -> Engine:
    loaded = describe(model_of(name))
    if is_packed:
        pack_weights(loaded)
    fields = {"max_num_seqs": 8, "max_batch_tokens": 256, "max_model_len": 128, "max_source_len": 128, **limits}
    return build_engine(loaded, EngineConfig(**fields), lambda _what, _share: None)


def text(ids: list[int]) -> Source:
    return Source(repr(ids).encode(), len(ids), tuple(ids))


def speech(seed: int) -> Source:
    return Source(f"speech {seed}".encode(), zoo.NUM_SOURCE_POSITIONS, features=zoo.features(seed=seed))


def sequence(number: int, source: Source, prompt_ids: list[int] | None = None, **fields: Any) -> Sequence:
    return greedy(number, prompt_ids or [zoo.START_ID], NUM_TOKENS, source=source, **fields)


def sources() -> list[list[int]]:
    return [prompt(length, seed=number) for number, length in enumerate(LENGTHS)]


@torch.no_grad()
def generate_speech(model: Any, seed: int, prompt_ids: list[int], num_tokens: int) -> list[int]:
    # Not WhisperGenerationMixin's: the model's own choice, without rules.
    output = GenerationMixin.generate(
        model,
        torch.from_numpy(zoo.features(seed=seed))[None],
        decoder_input_ids=torch.tensor([prompt_ids]),
        do_sample=False,
        max_new_tokens=num_tokens,
    )
    found: list[int] = output[0, len(prompt_ids) :].tolist()
    return found


@pytest.mark.parametrize("name", sorted(zoo.FAMILIES))
def test_every_family_gives_generates_tokens_alone_and_among_others(name: str) -> None:
    expected = [zoo.generate(model_of(name), ids, NUM_TOKENS) for ids in sources()]
    assert is_diverse(expected)
    engine = engine_of(name)
    assert engine.lane.name == ("seq2seq" if name in zoo.FLAT_FAMILIES else "solo")
    alone = drive(engine, [sequence(0, text(sources()[1]))])
    assert tokens(alone[0]) == expected[1]
    outputs = drive(engine, [sequence(n, text(ids)) for n, ids in enumerate(sources())], stagger=3)
    assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_steps_that_overlap_give_the_same_tokens(name: str) -> None:
    expected = [zoo.generate(model_of(name), ids, NUM_TOKENS) for ids in sources()]
    engine = engine_of(name, is_overlapped=True)
    assert engine.pipeline.is_on
    for _ in range(2):
        outputs = drive(engine, [sequence(n, text(ids)) for n, ids in enumerate(sources())], stagger=5)
        assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected


@pytest.mark.parametrize("name", [*sorted(zoo.FLAT_FAMILIES), "whisper"])
def test_packed_weights_give_generates_tokens_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(*functions: Any) -> list[float]:
        for function in functions:
            function()
        return [2.0, 1.0]

    monkeypatch.setattr(linear, "time_in_turn", times)  # these layers are too small to be faster
    engine = engine_of(name, is_packed=True)
    assert isinstance(engine.runner, Seq2SeqRunner)
    assert any(isinstance(module, PackedLinear) for module in engine.runner.decoder.model.modules())
    if name == "whisper":
        prompts = [prompt(4 + n, seed=n) for n in range(4)]
        expected = [generate_speech(model_of(name), n, ids, NUM_TOKENS) for n, ids in enumerate(prompts)]
        sequences = [sequence(n, speech(n), ids) for n, ids in enumerate(prompts)]
    else:
        expected = [zoo.generate(model_of(name), ids, NUM_TOKENS) for ids in sources()]
        sequences = [sequence(n, text(ids)) for n, ids in enumerate(sources())]
    outputs = drive(engine, sequences, stagger=3)
    assert [tokens(outputs[n]) for n in range(len(expected))] == expected


def test_whisper_gives_generates_tokens_alone_and_among_others() -> None:
    prompts = [[zoo.START_ID], prompt(4, seed=1), prompt(30, seed=2), prompt(2, seed=3), prompt(11, seed=4)]
    expected = [generate_speech(model_of("whisper"), n, ids, NUM_TOKENS) for n, ids in enumerate(prompts)]
    assert is_diverse(expected)
    engine = engine_of("whisper")
    assert engine.lane.name == "seq2seq"
    for n, ids in enumerate(prompts):
        assert tokens(drive(engine, [sequence(n, speech(n), ids)])[n]) == expected[n]
    # Small steps cut the prompts into pieces.
    for limit in (256, 8):
        engine = engine_of("whisper", max_batch_tokens=limit)
        outputs = drive(engine, [sequence(n, speech(n), ids) for n, ids in enumerate(prompts)], stagger=3)
        assert [tokens(outputs[n]) for n in range(len(prompts))] == expected


def test_a_speech_model_tells_probes_and_follows_rules() -> None:
    begun = prompt(20, seed=5)
    text_id, first_id = 150, 160
    rules = TokenRules((3, 4), (5,), timestamps=TimestampRules(first_id, text_id, first_id - 1, 8))
    probe = PromptProbe(4, (7, 8))
    params = SamplingParams(12, temperature=0.0, num_logprobs=0, token_rules=rules, probe=probe)
    engine = engine_of("whisper", max_batch_tokens=8)
    outputs = drive(engine, [sequence(n, speech(n), begun, params=params) for n in range(2)], stagger=1)
    for seed in range(2):
        made = tokens(outputs[seed])
        with torch.no_grad():
            features = torch.from_numpy(zoo.features(seed=seed))[None]
            logits = model_of("whisper")(features, decoder_input_ids=torch.tensor([begun + made])).logits[0]
        assert outputs[seed][0].probed == pytest.approx(logits[4].softmax(-1)[[7, 8]].tolist(), abs=1e-5)
        assert first_id <= made[0] <= first_id + 8
        assert len(made) == 12 and made[1] < first_id
        assert not {3, 4, first_id - 1} & set(made)
        stamps = [token for token in made if token >= first_id]
        assert stamps == sorted(stamps)


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma", "led"])
def test_a_longer_decoder_prompt_is_continued(name: str) -> None:
    begun = [zoo.START_ID, *prompt(9, seed=5)]
    expected = zoo.generate(model_of(name), sources()[1], NUM_TOKENS, prompt=begun)
    assert tokens(drive(engine_of(name), [sequence(0, text(sources()[1]), begun)])[0]) == expected


@pytest.mark.parametrize("name", ["t5", "umt5", "m2m_100"])
def test_preempted_sequences_go_on_as_if_nothing_had_been(name: str) -> None:
    expected = [zoo.generate(model_of(name), ids, NUM_TOKENS) for ids in sources()]
    probe = engine_of(name)
    per_token = probe.lane.kv_bytes_per_token
    # Half of the budget is the decoder's: room for two of its slots, with eight sequences that want one.
    engine = engine_of(name, kv_budget_bytes=per_token * 2 * 260, max_num_seqs=8)
    outputs = drive(engine, [sequence(n, text(ids)) for n, ids in enumerate(sources())], stagger=1)
    assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_static_slots_give_the_same_tokens_and_never_grow(name: str) -> None:
    expected = [zoo.generate(model_of(name), ids, NUM_TOKENS) for ids in sources()]
    engine = engine_of(name, is_static_cache=True, max_num_seqs=3, max_model_len=48, max_source_len=64)
    allocated = engine.stats().kv_bytes_allocated
    assert allocated == engine.lane.kv_bytes_per_token * 3 * (48 + 64)
    outputs = drive(engine, [sequence(n, text(ids)) for n, ids in enumerate(sources())], stagger=1)
    assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected
    assert engine.stats().kv_bytes_allocated == allocated


def test_sequences_of_one_source_share_its_slot_and_its_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("bart")
    assert isinstance(engine.runner, Seq2SeqRunner)
    encoded: list[int] = []
    encode = engine.runner.encoder.encode

    def counted(found: list[Source]) -> Any:
        encoded.append(len(found))
        return encode(found)

    monkeypatch.setattr(engine.runner.encoder, "encode", counted)
    ids = sources()[1]
    starts = [[zoo.START_ID], [zoo.START_ID, 9], [zoo.START_ID, 30, 31]]
    expected = [zoo.generate(model_of("bart"), ids, NUM_TOKENS, prompt=start) for start in starts]
    other = zoo.generate(model_of("bart"), sources()[2], NUM_TOKENS)
    batch = [sequence(n, text(ids), start) for n, start in enumerate(starts)]
    outputs = drive(engine, [*batch, sequence(3, text(sources()[2]))], stagger=1)
    assert [tokens(outputs[n]) for n in range(4)] == [*expected, other]
    assert sum(encoded) == 2
    # Asked again, the encoder is not.
    assert tokens(drive(engine, [sequence(4, text(ids))])[4]) == expected[0]
    assert sum(encoded) == 2
    stats = engine.stats()
    assert stats.prefix_cache_hits_total >= len(ids)
    engine.on_idle()
    assert engine.stats().kv_bytes_allocated <= 8192 * engine.lane.kv_bytes_per_token
    assert tokens(drive(engine, [sequence(5, text(ids))])[5]) == expected[0]
    assert sum(encoded) == 3


def test_a_shared_decoder_prompt_is_reused_for_the_same_source_only() -> None:
    engine = engine_of("bart")
    start = [zoo.START_ID, *prompt(40, seed=5)]
    expected = [zoo.generate(model_of("bart"), ids, NUM_TOKENS, prompt=start) for ids in sources()[:2]]
    assert expected[0] != expected[1]
    for n in (0, 1, 0):
        assert tokens(drive(engine, [sequence(n, text(sources()[n]), start)])[n]) == expected[n]


def test_without_prefix_caching_no_encoder_output_is_kept() -> None:
    engine = engine_of("t5", is_prefix_caching=False)
    assert isinstance(engine.kv, EncoderDecoderKV)
    drive(engine, [sequence(0, text(sources()[1]))])
    assert engine.kv.cross.num_positions_used == 0


def test_alignment_weights_are_those_of_the_models_own_cross_attention() -> None:
    model = model_of("whisper")
    model.set_attn_implementation("eager")
    ids = prompt(12, seed=8)
    with torch.no_grad():
        wanted = model(
            torch.from_numpy(zoo.features(seed=3))[None],
            decoder_input_ids=torch.tensor([ids]),
            output_attentions=True,
        ).cross_attentions
    engine = engine_of("whisper", max_batch_tokens=8)
    params = SamplingParams(max_tokens=0, is_aligning=True)
    aligned = sequence(0, speech(3), ids, params=params)
    drive(engine, [aligned, sequence(1, speech(4))], stagger=1)
    assert len(aligned.alignment) > 1  # the prompt was computed in pieces
    found = torch.cat([torch.from_numpy(piece) for piece in aligned.alignment], dim=1)
    # No heads are named: all of the upper half of the layers.
    torch.testing.assert_close(found, torch.cat([layer[0] for layer in wanted[1:]]), atol=1e-4, rtol=1e-3)


def test_what_can_never_fit_is_refused_before_anything_is_computed() -> None:
    engine = engine_of("t5", max_source_len=30)
    with pytest.raises(ContextLengthExceeded, match=r"31 tokens.*at most 30"):
        engine.add(sequence(0, text(prompt(31))))
    with pytest.raises(InvalidValue, match="reads a source"):
        engine.add(greedy(1, [zoo.START_ID], 3))
    tight = engine_of("t5", kv_budget_bytes=64 * engine.lane.kv_bytes_per_token)
    with pytest.raises(ContextLengthExceeded, match="encoder's output of 100"):
        tight.add(sequence(2, text(prompt(100))))
    assert not engine.has_work() and not tight.has_work()


def test_a_step_that_fails_leaves_nothing_behind_and_the_next_one_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("bart")
    assert isinstance(engine.runner, Seq2SeqRunner)

    def broken(_: Any) -> Any:
        raise RuntimeError("no")

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner.encoder, "encode", broken)
        engine.add(sequence(0, text(sources()[1])))
        (failed,) = engine.step()
    assert failed.error is not None
    engine.kv.check_integrity()
    expected = zoo.generate(model_of("bart"), sources()[1], NUM_TOKENS)
    assert tokens(drive(engine, [sequence(1, text(sources()[1]))])[1]) == expected
