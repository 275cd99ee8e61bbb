"""An engine that follows a script instead of a model: every sequence gets the tokens 100, 101, ... of its max_tokens.

Knows nothing of tensors; what it was told is kept for tests to look at.
Driven by an EngineThread in tests of the manager.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from config import Settings
from engine.errors import ContextLengthExceeded
from engine.sequence import EngineStats, Sequence, SequenceOutput, TokenLogprobs
from model_manager import LoadedStack, ModelInfo, Progress

TOO_LONG = 1000  # prompts of this many tokens are refused


@dataclass
class ScriptedEngine:
    """See the module; `gate` is held open by default, closing it makes steps wait."""

    steps: list[list[int]] = field(default_factory=list)  # the ids of the sequences in each step
    aborted: list[int] = field(default_factory=list)
    added: list[Sequence] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    num_idle: int = 0
    is_closed: bool = False
    step_s: float = 0.0
    on_step: Callable[[], None] = lambda: None
    on_add: Callable[[Sequence], None] = lambda _: None
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self._running: dict[int, tuple[Sequence, int]] = {}

    def add(self, sequence: Sequence) -> None:
        """Takes it, unless it is TOO_LONG."""
        self.threads.add(threading.get_ident())
        self.on_add(sequence)
        if len(sequence.prompt_token_ids) >= TOO_LONG:
            raise ContextLengthExceeded(f"{len(sequence.prompt_token_ids)} tokens are more than {TOO_LONG}")
        self.added.append(sequence)
        self._running[sequence.sequence_id] = (sequence, 0)

    def abort(self, sequence_id: int) -> None:
        """Forgets it."""
        self.aborted.append(sequence_id)
        self._running.pop(sequence_id, None)

    def step(self) -> list[SequenceOutput]:
        """One token for everybody."""
        self.gate.wait(10)
        time.sleep(self.step_s)
        self.on_step()
        self.steps.append(list(self._running))
        outputs = []
        for sequence_id, (sequence, number) in list(self._running.items()):
            params = sequence.params
            is_last = number + 1 >= params.max_tokens
            is_scoring_prompt = number == 0 and params.num_prompt_logprobs is not None
            outputs.append(
                SequenceOutput(
                    sequence_id,
                    (100 + number,),
                    logprobs=(TokenLogprobs(-float(number)),) if params.num_logprobs is not None else None,
                    prompt_logprobs=(None,) if is_scoring_prompt else None,
                    finish_reason="length" if is_last else None,
                    scheduled_time_s=1.0,
                )
            )
            if is_last:
                del self._running[sequence_id]
            else:
                self._running[sequence_id] = (sequence, number + 1)
        return outputs

    def has_work(self) -> bool:
        """Whether anybody runs."""
        return bool(self._running)

    def stats(self) -> EngineStats:
        """How many run, and how many steps there were."""
        return EngineStats(num_running=len(self._running), steps_total=len(self.steps))

    def on_idle(self) -> None:
        """Counts."""
        self.num_idle += 1

    def wake_with(self, wake: Callable[[], None]) -> None:
        pass

    def profile_again(self) -> None:
        pass

    def close(self) -> None:
        """Notes it."""
        self.is_closed = True


def stack_of(engine: ScriptedEngine, settings: Settings) -> LoadedStack:
    """A stack around it, without tokenizer."""
    nothing: Any = None
    info = ModelInfo(
        name=settings.model_name,
        architecture="Scripted",
        dtype="float32",
        device="cpu",
        lane="flat",
        lane_reason="scripted",
        max_model_len=TOO_LONG,
        vocab_size=1000,
        eos_token_ids=frozenset({0}),
        kv_budget_bytes=2**30,
        kv_bytes_per_token=64,
        num_parameters=1,
        generation_defaults={},
    )
    return LoadedStack(engine, nothing, nothing, info)


def loader_of(engine: ScriptedEngine) -> Callable[[Settings, Progress], LoadedStack]:
    """A loader that gives the scripted stack at once."""
    return lambda settings, _: stack_of(engine, settings)
