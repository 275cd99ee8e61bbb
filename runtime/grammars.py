"""The grammars of one model: tried out, compiled on a thread of their own, the latest kept.

Knows nothing of fields or of sampling.
Owned by ModelManager; the event loop asks for grammars, nothing but look-ups happens on it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from engine.sequence import TokenGrammar
from runtime.grammar_trials import GrammarTrials

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from text.grammar import CompiledGrammar, GrammarSpec
    from text.grammar_vocabulary import GrammarVocabulary

    _Key = tuple[GrammarSpec, bool]

MAX_KEPT = 64


class Grammars:
    """Compiles grammars over one model's vocabulary.

    Args:
        tokenizer: of any kind.
        vocab_size: of the model, padded as its logits are.
        end_token_ids: the model's own.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = frozenset(end_token_ids)
        # One thread: grammars wait for each other, and nobody else for them.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._kept: OrderedDict[_Key, CompiledGrammar] = OrderedDict()
        self._compiling: dict[_Key, asyncio.Future[CompiledGrammar]] = {}
        # The thread's own.
        self._vocabulary: GrammarVocabulary | None = None
        self._ll_tokenizer: LLTokenizer | None = None
        self._trials: GrammarTrials | None = None

    async def get(self, spec: GrammarSpec, prompt_token_ids: Sequence[int]) -> TokenGrammar:
        """The grammar of what is generated after a prompt.

        Raises:
            GrammarError: it cannot be used.
        """
        from text.grammar_vocabulary import drops_first_space

        key = (spec, drops_first_space(self._tokenizer, prompt_token_ids))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        # Shielded: a caller that leaves must not take the grammar from others who wait for it.
        return await asyncio.shield(self._compiling.get(key) or self._start(key))

    def close(self) -> None:
        """Ends the process of trials; whoever waits is cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._trials is not None:
            self._trials.close()

    def _start(self, key: _Key) -> asyncio.Future[CompiledGrammar]:
        """Has a grammar compiled, which all who ask for it meanwhile wait for."""

        def end(compiled: asyncio.Future[CompiledGrammar]) -> None:
            del self._compiling[key]
            # The failure is looked at in any case: perhaps nobody waits for it any more.
            if compiled.cancelled() or compiled.exception() is not None:
                return
            self._kept[key] = compiled.result()
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)

        compiling = asyncio.get_running_loop().run_in_executor(self._executor, self._compile, *key)
        self._compiling[key] = compiling
        compiling.add_done_callback(end)
        return compiling

    def _compile(self, spec: GrammarSpec, drops_space: bool) -> CompiledGrammar:
        """On the thread."""
        from text.grammar import compile_grammar, grammar_source
        from text.grammar_vocabulary import make_tokenizer, read_vocabulary

        source = grammar_source(spec, drops_first_space=drops_space)
        if self._vocabulary is None or self._ll_tokenizer is None or self._trials is None:
            self._vocabulary = read_vocabulary(self._tokenizer, self._vocab_size, self._end_token_ids)
            self._ll_tokenizer = make_tokenizer(self._vocabulary)
            self._trials = GrammarTrials(self._vocabulary)
        self._trials.check(source)
        return compile_grammar(source, self._ll_tokenizer, frozenset(self._vocabulary.end_token_ids))
