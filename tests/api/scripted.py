"""An engine that plays back scripts instead of running a model, and a stack around it with a real tokenizer.

Knows nothing of HTTP.
Used by the tests of api/ and by benchmarks/wire_cost.py's like.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from config import Settings
from engine.errors import ServerError
from engine.sequence import EngineStats, Sequence, SequenceOutput, TokenLogprobs
from model_manager import LoadedStack, ModelInfo, Progress
from text.prompt import PromptEncoder

MAX_MODEL_LEN = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones: small enough to reason about, and multi-byte characters span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


Script = Callable[[Sequence], Iterator[SequenceOutput]]


def says(ids: list[int], eos: int | None, *, per_step: int = 1) -> Script:
    """A script that says these ids and then ends, by EOS or by length; logprobs fall with each token."""

    def script(sequence: Sequence) -> Iterator[SequenceOutput]:
        params = sequence.params
        wanted = (ids if eos is None else [*ids, eos])[: params.max_tokens]
        prompt_logprobs = None
        if params.num_prompt_logprobs is not None:
            known = [TokenLogprobs(-0.5, ((i, -0.5),)) for i in sequence.prompt_token_ids[1:]]
            prompt_logprobs = (None, *known)
        if not wanted:
            yield SequenceOutput(sequence.sequence_id, prompt_logprobs=prompt_logprobs, finish_reason="length")
        for start in range(0, len(wanted), per_step):
            some = tuple(wanted[start : start + per_step])
            is_last = start + per_step >= len(wanted)
            has_eos = is_last and some[-1] == eos
            logprobs = None
            if params.num_logprobs is not None:
                top = tuple((some[0] + rank, -0.1 - rank) for rank in range(params.num_logprobs))
                logprobs = tuple(TokenLogprobs(-0.1 * (start + n + 1), top) for n in range(len(some)))
            yield SequenceOutput(
                sequence.sequence_id,
                some,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs if start == 0 else None,
                finish_reason=None if not is_last else "stop" if has_eos else "length",
                stop_token_id=eos if has_eos else None,
                num_cached_tokens=min(2, len(sequence.prompt_token_ids)),
                scheduled_time_s=sequence.arrival_time_s,
            )

    return script


def fails(error: ServerError, after: list[int] | None = None) -> Script:
    """A script that fails, after some tokens."""

    def script(sequence: Sequence) -> Iterator[SequenceOutput]:
        for token_id in after or ():
            yield SequenceOutput(sequence.sequence_id, (token_id,))
        yield SequenceOutput(sequence.sequence_id, error=error)

    return script


@dataclass
class ScriptedEngine:
    """Plays `script` for every sequence, one output a sequence a step; keeps what it was given for tests to look at."""

    script: Script
    step_s: float = 0.0
    refusal: ServerError | None = None
    added: list[Sequence] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    may_step: threading.Event = field(default_factory=threading.Event)
    death: BaseException | None = None
    running: dict[int, Iterator[SequenceOutput]] = field(default_factory=dict)
    num_steps: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.may_step.set()

    def add(self, sequence: Sequence) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.added.append(sequence)
        self.running[sequence.sequence_id] = self.script(sequence)

    def abort(self, sequence_id: int) -> None:
        if self.running.pop(sequence_id, None) is not None:
            self.aborted.append(sequence_id)

    def step(self) -> list[SequenceOutput]:
        if self.death is not None:
            raise self.death
        if not self.may_step.wait(0.01):
            return []
        if self.step_s:
            time.sleep(self.step_s)
        outputs = []
        for sequence_id, script in list(self.running.items()):
            output = next(script)
            outputs.append(output)
            if output.is_last:
                del self.running[sequence_id]
        self.num_steps += 1
        self.num_tokens += sum(len(output.token_ids) for output in outputs)
        return outputs

    def has_work(self) -> bool:
        return bool(self.running)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=3,
            kv_bytes_allocated=1,
            kv_budget_bytes=4,
            prefix_cache_queries_total=20,
            prefix_cache_hits_total=5,
            steps_total=self.num_steps,
            step_tokens_total=self.num_tokens,
            compiled_batch_sizes=(1, 4),
            compiled_encoder_batch_sizes=(1,),
            graph_batch_sizes=(8,),
        )

    def on_idle(self) -> None:
        pass

    def wake_with(self, wake: Callable[[], None]) -> None:
        pass

    def profile_again(self) -> None:
        pass

    def close(self) -> None:
        self.running.clear()


def stack(
    engine: ScriptedEngine, tokenizer: Any, *, max_model_len: int = MAX_MODEL_LEN, **more: Any
) -> Callable[[Settings, Progress], LoadedStack]:
    """What a ModelManager loads instead of a model; `more` is what else its ModelInfo says."""

    def load(settings: Settings, progress: Progress) -> LoadedStack:
        prompts = PromptEncoder(tokenizer, max_model_len=max_model_len)
        info = ModelInfo(
            name=settings.model_name,
            architecture="ScriptedForCausalLM",
            dtype="float32",
            device="cpu",
            lane="solo",
            lane_reason="scripted",
            max_model_len=max_model_len,
            vocab_size=len(tokenizer),
            eos_token_ids=frozenset({tokenizer.eos_token_id}),
            kv_budget_bytes=4,
            kv_bytes_per_token=1,
            num_parameters=0,
            generation_defaults={"temperature": 0.6},
            **more,
        )
        return LoadedStack(engine, prompts, tokenizer, info)

    return load
