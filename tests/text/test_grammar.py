"""Grammars over vocabularies of every kind: what may follow is what keeps to them, token by token."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.text.vocabularies import KINDS, byt5, byte_level, sentencepiece, unigram
from text.errors import GrammarError
from text.grammar import MAX_WHITESPACE, CompiledGrammar, GrammarSpec, MatcherState, compile_grammar, grammar_source
from text.grammar_vocabulary import GrammarVocabulary, drops_first_space, make_tokenizer, read_vocabulary
from text.output import TextOutput
from text.token_bytes import token_bytes_of

ROOT = Path(__file__).parents[2]
PADDING = 37
SCHEMAS: dict[str, Any] = {
    "object": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"enum": ["a", "bc", 1, None]}, "minItems": 1, "maxItems": 3},
    "choice of types": {"anyOf": [{"type": "boolean"}, {"type": "number", "maximum": 99.5, "minimum": -3}]},
    "recursive": {
        "$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}, "additionalProperties": False}},
        "$ref": "#/$defs/n",
    },
    "date": {"type": "string", "format": "date"},
    "pattern": {"type": "string", "pattern": "^[a-f]{2,4}$"},
}
REGEXES = ["[a-c]{2,5}", "(foo|ba+r) ?[0-9]{1,3}", "\\d\\d:\\d\\d", "Gr(ü|u)ß[ef]*", 'a/b"c\\\\d?']


@cache
def demo(name: str) -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "demo" / name)


TOKENIZERS: dict[str, Any] = {**KINDS, "demo": lambda: demo("chat"), "demo-t5": lambda: demo("t5")}


@cache
def tokenizer_of(kind: str) -> Any:
    return TOKENIZERS[kind]()


@cache
def vocabulary_of(kind: str) -> GrammarVocabulary:
    tokenizer = tokenizer_of(kind)
    ends = {i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None}
    return read_vocabulary(tokenizer, len(tokenizer) + PADDING, ends)


@cache
def ll_tokenizer_of(kind: str) -> Any:
    return make_tokenizer(vocabulary_of(kind))


def grammar_of(kind: str, spec: GrammarSpec, *, drops_space: bool = False) -> CompiledGrammar:
    source = grammar_source(spec, drops_first_space=drops_space)
    return compile_grammar(source, ll_tokenizer_of(kind), frozenset(vocabulary_of(kind).end_token_ids))


def json_spec(schema: Any) -> GrammarSpec:
    return GrammarSpec("json", json.dumps(schema))


def allowed(state: MatcherState, num_tokens: int) -> list[int]:
    """What may follow; nothing where the vocabulary cannot spell what must."""
    bits = np.zeros(-(-num_tokens // 32) * 4 + 16, dtype=np.uint8)  # wider than need be, as workspaces are
    if (reason := state.fill(bits)) is not None:
        assert "no token of this model's vocabulary may follow" in reason and not bits.any()
        return []
    found = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
    assert found.size and found[-1] < num_tokens
    return [int(token_id) for token_id in found]


def walk(grammar: CompiledGrammar, num_tokens: int, seed: int, *, longest: int = 400) -> list[int] | None:
    """Random allowed tokens until the text is complete; None when it is not within `longest`."""
    chance, state, ids = random.Random(seed), grammar.start(), list[int]()
    while len(ids) < longest:
        found = allowed(state, num_tokens)
        if not found:
            return None
        ids.append(chance.choice(found))
        if state.accept(ids[-1]):
            return [i for i in ids if i not in grammar.end_token_ids]
    return None


def text_of(kind: str, ids: list[int], prompt: list[int]) -> str:
    return TextOutput(tokenizer_of(kind), prompt).push(ids, is_last=True).text


def can_spell(kind: str, characters: str) -> bool:
    tokens = vocabulary_of(kind).tokens
    return all(character.encode() in tokens for character in characters)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_choices_allow_exactly_the_tokens_that_go_on_to_one(kind: str) -> None:
    choices = ["yes", "yesterday", "no", "maybe so", 'say "hi"\n']
    vocabulary = vocabulary_of(kind)
    if not can_spell(kind, "yes"):
        choices = [piece.decode() for piece in vocabulary.tokens if piece.strip().isalpha() and piece.isascii()][:9]
    num_tokens = len(vocabulary.tokens)
    grammar = grammar_of(kind, GrammarSpec("choice", json.dumps(choices)))
    wanted = [choice.encode() for choice in choices]
    met = set()
    for seed in range(12):
        chance, state, text = random.Random(seed), grammar.start(), b""
        while True:
            expected = {
                token_id
                for token_id, token in enumerate(vocabulary.tokens)
                if token and token_id not in vocabulary.special_ids
                if any(choice.startswith(text + token) for choice in wanted)
            }
            ends = set(vocabulary.end_token_ids) if text in wanted else set()
            found = allowed(state, num_tokens)
            assert set(found) == expected | ends
            if not found:
                break
            token_id = chance.choice(found)
            is_over = state.accept(token_id)
            if token_id not in ends:
                text += vocabulary.tokens[token_id]
            goes_on = any(choice.startswith(text) and choice != text for choice in wanted)
            assert is_over == (token_id in ends or (text in wanted and not goes_on))
            if is_over:
                met.add(text)
                break
    assert met <= set(wanted) and len(met) > 1


@pytest.mark.parametrize("kind", ["byte-level", "llama-first", "byt5", "words"])
@pytest.mark.parametrize("spec", [*map(json_spec, SCHEMAS.values()), *(GrammarSpec("regex", r) for r in REGEXES)])
def test_the_mask_holds_exactly_the_tokens_that_the_parser_takes(kind: str, spec: GrammarSpec) -> None:
    num_tokens = len(vocabulary_of(kind).tokens)
    state = grammar_of(kind, spec).start()
    chance = random.Random(5)
    for _ in range(12):
        ends = state.end_token_ids
        found = allowed(state, num_tokens)
        taken = [i for i in range(num_tokens) if i not in ends and state._matcher.validate_tokens([i])]
        assert [i for i in found if i not in ends] == taken
        assert (ends <= set(found)) == state._matcher.is_accepting() and ends & set(found) in (ends, set())
        if state.accept(chance.choice(taken or found)):
            break


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_texts_of_a_schema_are_valid(kind: str, name: str) -> None:
    if not can_spell(kind, '{}[]":,'):
        with pytest.raises(GrammarError, match="no text of this model's vocabulary keeps to it"):
            grammar_of(kind, json_spec({"type": "object"}))
        return
    spec = json_spec(SCHEMAS[name])
    prompt = tokenizer_of(kind).encode("Hello world")
    grammar = grammar_of(kind, spec, drops_space=drops_first_space(tokenizer_of(kind), prompt))
    num_tokens = len(vocabulary_of(kind).tokens)
    texts = [text_of(kind, ids, prompt) for seed in range(25) if (ids := walk(grammar, num_tokens, seed)) is not None]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert len({*texts}) > 1


@pytest.mark.parametrize("kind", ["byte-level", "llama-first", "llama-legacy", "byt5", "words", "demo", "demo-t5"])
@pytest.mark.parametrize("regex", REGEXES)
def test_random_texts_of_a_regex_match_it(kind: str, regex: str) -> None:
    grammar = grammar_of(kind, GrammarSpec("regex", regex))
    prompt = tokenizer_of(kind).encode("Hello world")
    for seed in range(10):
        ids = walk(grammar, len(vocabulary_of(kind).tokens), seed)
        if ids is not None:
            assert re.fullmatch(regex, text_of(kind, ids, prompt))


# Not WordPiece: where a text begins, the pieces that go on with a word are written with their marks.
@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "wordpiece"])
def test_where_a_text_begins_its_first_space_is_none_exactly_where_decoding_drops_it(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for prompt in ([tokenizer.pad_token_id or 0], tokenizer.encode("a")):
        drops = drops_first_space(tokenizer, prompt)
        grammar = grammar_of(kind, GrammarSpec("regex", "[a-z]{1,3}"), drops_space=drops)
        for seed in range(8):
            ids = walk(grammar, len(vocabulary_of(kind).tokens), seed)
            if ids is not None and not tokenizer.is_fast and drops:
                continue  # decodes by rules of its own
            if ids is not None:
                assert re.fullmatch("[a-z]{1,3}", text_of(kind, ids, prompt))


def test_sentencepiece_drops_the_first_space_of_a_text_and_of_nothing_else() -> None:
    for tokenizer in (sentencepiece(), unigram()):
        assert drops_first_space(tokenizer, [tokenizer.bos_token_id])
        assert not drops_first_space(tokenizer, tokenizer.encode("a"))
    assert not drops_first_space(byte_level(), [0])


def test_white_space_is_bounded_wherever_json_has_it() -> None:
    space = vocabulary_of("byte-level").tokens.index(b" ")
    state = grammar_of("byte-level", json_spec({"type": "object"})).start()
    state.accept(vocabulary_of("byte-level").tokens.index(b"{"))
    for _ in range(MAX_WHITESPACE):
        assert space in allowed(state, 600)
        state.accept(space)
    assert space not in allowed(state, 600)


def test_padding_special_tokens_and_ids_beyond_the_tokenizer_are_never_text() -> None:
    for make in (byte_level, byt5):
        tokenizer = make()
        special = token_bytes_of(tokenizer).special_ids
        vocabulary = read_vocabulary(tokenizer, len(tokenizer) + PADDING, [tokenizer.eos_token_id])
        grammar = compile_grammar(
            grammar_source(GrammarSpec("regex", "(.|\n)+"), drops_first_space=False),
            make_tokenizer(vocabulary),
            frozenset({tokenizer.eos_token_id}),
        )
        found = set(allowed(grammar.start(), len(vocabulary.tokens)))
        assert not found & special and max(found) < len(tokenizer)


def test_a_model_smaller_than_its_tokenizer_and_one_without_eos() -> None:
    tokenizer = byte_level()
    assert len(read_vocabulary(tokenizer, 300, [5]).tokens) == 300
    special = token_bytes_of(tokenizer).special_ids
    assert read_vocabulary(tokenizer, 500, []).end_token_ids == (min(special),)
    with pytest.raises(GrammarError, match="no token that ends a text"):
        read_vocabulary(tokenizer, 300, [])


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json", "{", "no JSON"),
        ("json", "[]", "an object, true or false"),
        ("json", "[" * 100_000, "no JSON"),
        ("json", '{"type": "objekt"}', "Invalid type: objekt"),
        ("json", '{"type": "array", "uniqueItems": true}', 'Unimplemented keys: ["uniqueItems"]'),
        ("json", '{"not": {}}', 'Unimplemented keys: ["not"]'),
        ("json", '{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance"),
        ("json", '{"$ref": "http://127.0.0.1/schema"}', "does not fetch"),
        ("json", '{"$ref": "#"}', "no text of this model's vocabulary"),
        ("json", "false", "Unimplemented"),
        ("regex", "(a", "unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("regex", "(" * 2000 + ")" * 2000, "regex"),
        ("lark", "start: nothing", 'unknown name: "nothing"'),
        ("lark", "rule: /a/", "start"),
        ("lark", "start: <nothing>", "unknown special token"),
        ("lark", "start: start", "no text of this model's vocabulary"),
    ],
)
def test_what_is_no_grammar_is_refused_in_the_compilers_words(kind: Any, text: str, reason: str) -> None:
    with pytest.raises(GrammarError) as caught:
        grammar_of("byte-level", GrammarSpec(kind, text))
    message = str(caught.value)
    assert reason.lower() in message.lower()
    assert len(message) < 400 and "\n" not in message and "no_forcing" not in message


def test_a_grammar_may_name_special_tokens() -> None:
    tokenizer = tokenizer_of("byte-level")
    state = grammar_of("byte-level", GrammarSpec("lark", 'start: "a" <|im_start|> "b"')).start()
    state.accept(vocabulary_of("byte-level").tokens.index(b"a"))
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in allowed(state, 600)


def test_states_of_one_grammar_go_their_own_ways() -> None:
    grammar = grammar_of("byte-level", GrammarSpec("choice", '["aa", "bb"]'))
    one, other = grammar.start(), grammar.start()
    a, b = (vocabulary_of("byte-level").tokens.index(letter) for letter in (b"a", b"b"))
    assert not one.accept(a)
    assert not other.accept(b)
    assert (allowed(one, 600), allowed(other, 600)) == ([a], [b])
    assert one.accept(a)
    assert set(allowed(grammar.start(), 600)) >= {a, b}


def test_what_the_grammar_forbids_ends_it_with_a_reason() -> None:
    state = grammar_of("byte-level", GrammarSpec("choice", '["aa"]')).start()
    assert not state.accept(vocabulary_of("byte-level").tokens.index(b"b"))
    bits = np.zeros(128, dtype=np.uint8)
    assert state.fill(bits) and not bits.any()
