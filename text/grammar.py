"""Compiles what a text must be like into a grammar over a vocabulary, and follows it token by token.

Knows nothing of requests or of sampling; masks are bits that whoever samples applies.
Called by runtime/grammars.py; a CompiledGrammar is a TokenGrammar of the engine.

No token is forced: wherever several tokens spell the text that must come, the model chooses among them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from text.errors import GrammarError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_WHITESPACE = 8
"""Most white space between two parts of JSON: enough to indent, and no model can go on with it for ever."""

LIMITS: dict[str, int | bool] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,  # 7 ms of one step
    "step_max_items": 50_000,
    "max_lexer_states": 25_000,  # of 1-2 kB, for each sequence
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""Of LLParserLimits: what a grammar may take to be compiled, and at each step."""

# What llguidance says where the text could go on, but by no token.
_DEAD_END = "NoExtensionBias"
_NOTHING_FOLLOWS = "no token of this model's vocabulary may follow"
_MAX_REASON = 300
_REPEATED_LINE = re.compile(r"\s*(\d+ \||\^)")
_WHITESPACE = rf"[\x20\x0A\x0D\x09]{{1,{MAX_WHITESPACE}}}"
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_SPACE = '" "? '


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What a text must be like.

    Args:
        kind: how `text` says it: a JSON schema, a regular expression that the whole text matches, a grammar in Lark's
            notation, or a JSON list of the texts to choose from.
        text: what it says.
    """

    kind: Literal["json", "regex", "lark", "choice"]
    text: str


def grammar_source(spec: GrammarSpec, *, drops_first_space: bool) -> str:
    """A specification in llguidance's own form.

    Args:
        spec: what is asked.
        drops_first_space: whether a space before all is no part of the text, see text/grammar_vocabulary.py.
    Raises:
        GrammarError: it cannot be read.
    """
    space = _SPACE if drops_first_space else ""
    if spec.kind == "json":
        schema = _read_schema(spec.text)
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        schema["x-guidance"] = {"whitespace_pattern": _WHITESPACE}
        return _nested(space, {"json_schema": schema})
    if spec.kind == "choice":
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(spec.text))
        return _lark(f"start: {space}({choices})\n")
    if spec.kind == "regex":
        return _lark(f"start: {space}{_regex(spec.text)}\n")
    return _nested(space, {"lark_grammar": spec.text}) if space else _lark(spec.text)


def _lark(grammar: str) -> str:
    # Options come last, so that the line numbers of messages are the caller's.
    return json.dumps({"grammars": [{"name": "output", "lark_grammar": f"{grammar}\n{_OPTIONS}"}]})


def _nested(space: str, output: dict[str, Any]) -> str:
    start = {"name": "start", "lark_grammar": f"{_OPTIONS}start: {space}@output\n"}
    return json.dumps({"grammars": [start, {"name": "output", **output}]})


def _regex(regex: str) -> str:
    """As Lark's notation has it; `\\d` is 0 to 9, not the digits of all scripts."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex, 'd')}/"


def _read_schema(text: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"no JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise GrammarError("a JSON schema is an object, true or false")
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise GrammarError('Unimplemented keys: ["x-guidance"]')
    return schema


def compile_grammar(source: str, tokenizer: LLTokenizer, end_token_ids: frozenset[int]) -> CompiledGrammar:
    """A grammar over a vocabulary.

    Args:
        source: grammar_source's.
        tokenizer: the vocabulary, see text/grammar_vocabulary.py.
        end_token_ids: of the vocabulary.
    Raises:
        GrammarError: the compiler refuses it, or no text of this vocabulary keeps to it.
    """
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, source, log_level=0, limits=_limits())
    if matcher.is_error():
        raise GrammarError(_reason(matcher))
    grammar = CompiledGrammar(matcher, tokenizer.vocab_size, end_token_ids)
    if not grammar.has_beginning():
        raise GrammarError("no text of this model's vocabulary keeps to it")
    return grammar


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS)  # type: ignore[arg-type]


def _reason(matcher: LLMatcher) -> str:
    """The compiler's message on one line, without the grammar that it repeats and what it says of its own insides."""
    lines = matcher.get_error().partition("<state>")[0].replace("<non-verbose/>", "").splitlines()
    reason = " ".join(" ".join(line for line in lines if not _REPEATED_LINE.match(line)).split())
    return reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON] + "…"


class CompiledGrammar:
    """A grammar over a vocabulary; a TokenGrammar of the engine.

    Args:
        matcher: at its beginning; copied for each sequence, never moved.
        vocab_size: tokens of the vocabulary.
        end_token_ids: those that end a text.
    """

    __slots__ = ("_matcher", "end_token_ids", "num_bytes")

    def __init__(self, matcher: LLMatcher, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self.num_bytes = -(-vocab_size // 32) * 4
        self.end_token_ids = end_token_ids

    def start(self) -> MatcherState:
        """The state of a text that has not begun."""
        return MatcherState(self, self._matcher.deep_copy())

    def has_beginning(self) -> bool:
        """Whether any token may come first, or the text may be empty."""
        import numpy as np

        return self.start().fill(np.zeros(self.num_bytes, dtype=np.uint8)) is None


class MatcherState:
    """Where one text stands in its grammar; a GrammarState of the engine, which tells what the methods promise."""

    __slots__ = ("_grammar", "_matcher")

    def __init__(self, grammar: CompiledGrammar, matcher: LLMatcher) -> None:
        self._grammar = grammar
        self._matcher = matcher

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end the text and are no part of it."""
        return self._grammar.end_token_ids

    def fill(self, bits: npt.NDArray[np.uint8]) -> str | None:
        """Write which tokens may follow into `bits`; returns why none can."""
        matcher = self._matcher
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(bits.ctypes.data, self._grammar.num_bytes)
        if matcher.is_error():
            bits.fill(0)  # what is written then would let the text end
            reason = _reason(matcher)
            return _NOTHING_FOLLOWS if reason in ("", _DEAD_END) else reason
        return None if bits.any() else _NOTHING_FOLLOWS

    def accept(self, token_id: int) -> bool:
        """Go on by a token; returns whether the text is complete and nothing may follow."""
        return self._matcher.consume_token(token_id) and self._matcher.is_stopped()
