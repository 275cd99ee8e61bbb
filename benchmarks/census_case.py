"""One architecture of the census: a tiny model, what generate() says, what the engine says, and where they part.

Knows nothing of other architectures, processes or tables.
Called by benchmarks/census.py.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from benchmarks.tiny_configs import tiny_config
from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.loader import describe
from engine.sequence import SamplingParams, SequenceOutput
from engine.sequence import Sequence as EngineSequence
from tests import zoo

Outcome = Literal["exact", "mismatch", "error", "crash", "no generate()"]

NUM_NEW_TOKENS = 16
NUM_STEPS_BETWEEN_ARRIVALS = 3
MAX_STEPS = 2000
# Tried until one gives varied outputs: architectures differ in how much noise they need to have opinions.
WEIGHT_STDS = (0.12, 0.3, 0.5)

# Types whose generate() cannot run from token ids alone, and why; the census tries all the same.
NOT_TEXT_ALONE = {
    "blt": "transformers' generate() asks BltConfig for num_hidden_layers, which it lacks",
    "gemma3n": "its vision tower needs Pillow and timm; its language model is gemma3n_text",
    "gemma4_assistant": "a draft model: it reads the hidden states and KV of its target",
    "gemma4_unified_assistant": "a draft model: it reads the hidden states and KV of its target",
    "musicgen": "generates audio codes from a text encoder, not text",
    "musicgen_melody": "generates audio codes from a text encoder, not text",
}


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What became of one type."""

    model_type: str
    outcome: Outcome
    architecture: str = ""
    lane: str = ""
    why: str = ""
    num_distinct: int | None = None
    logprob_difference: float | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """What generate() answers to one prompt: `logits` [L, V] before each of its `token_ids`."""

    prompt: list[int]
    token_ids: list[int]
    logits: torch.Tensor


def run_case(model_type: str) -> CaseResult:
    """Build, generate, serve and compare one type; whatever it raises is its result."""
    try:
        model, references = _reference(model_type)
    except Exception as failure:
        return CaseResult(model_type, "no generate()", why=NOT_TEXT_ALONE.get(model_type) or _one_line(failure))
    architecture = type(model).__name__
    distinct = len({token for reference in references for token in reference.token_ids})
    try:
        engine = build_engine(describe(model), _engine_config(), lambda _what, _share: None)
        outputs = serve(engine, [reference.prompt for reference in references])
    except Exception as failure:
        return CaseResult(model_type, "error", architecture, why=_one_line(failure), num_distinct=distinct)
    misses = [miss for reference, output in zip(references, outputs, strict=True) if (miss := _miss(reference, output))]
    difference = max(_logprob_difference(r, o) for r, o in zip(references, outputs, strict=True))
    return CaseResult(
        model_type,
        "mismatch" if misses else "exact",
        architecture,
        lane=engine.lane.name,
        why="; ".join([*misses, engine.lane.reason]),
        num_distinct=distinct,
        logprob_difference=difference,
    )


def serve(engine: Engine, prompts: Sequence[list[int]]) -> list[list[SequenceOutput]]:
    """Greedy outputs of `prompts`, which arrive a few steps apart.

    Raises:
        RuntimeError: the engine does not come to an end.
    """
    waiting = [
        EngineSequence(
            sequence_id=index,
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, num_logprobs=0),
            arrival_time_s=time.monotonic(),
        )
        for index, prompt in enumerate(prompts)
    ]
    outputs: list[list[SequenceOutput]] = [[] for _ in prompts]
    for step in range(MAX_STEPS):
        if waiting and step % NUM_STEPS_BETWEEN_ARRIVALS == 0:
            engine.add(waiting.pop(0))
        for output in engine.step():
            outputs[output.sequence_id].append(output)
        if not waiting and not engine.has_work():
            engine.on_idle()
            return outputs
    raise RuntimeError(f"the engine still has work after {MAX_STEPS} steps")


def _engine_config() -> EngineConfig:
    # Few tokens a step, so that the longer prompts are prefilled in chunks beside decoding rows.
    return EngineConfig(max_num_seqs=4, max_batch_tokens=16, max_model_len=128)


def _prompts() -> list[list[int]]:
    long = zoo.prompt(40, seed=4)
    return [zoo.prompt(7, seed=1), long, zoo.prompt(21, seed=2), zoo.prompt(3, seed=3), long[:30] + zoo.prompt(5)]


def _reference(model_type: str) -> tuple[PreTrainedModel, list[Reference]]:
    """The tiny model with the most varied outputs, and these."""
    best: tuple[int, float] = (-1, 0.0)
    for weight_std in WEIGHT_STDS:
        model = zoo.instantiate(tiny_config(model_type), weight_std=weight_std)
        references = [_generate(model, prompt) for prompt in _prompts()]
        if zoo.is_diverse([reference.token_ids for reference in references]):
            return model, references
        best = max(best, (len({t for r in references for t in r.token_ids}), weight_std))
    model = zoo.instantiate(tiny_config(model_type), weight_std=best[1])
    return model, [_generate(model, prompt) for prompt in _prompts()]


@torch.no_grad()
def _generate(model: PreTrainedModel, prompt: list[int]) -> Reference:
    """What generate() says, one prompt at a time, greedily."""
    input_ids = torch.tensor([prompt])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=NUM_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Reference(prompt, output.sequences[0, len(prompt) :].tolist(), torch.stack(output.logits)[:, 0].float())


def _miss(reference: Reference, outputs: Sequence[SequenceOutput]) -> str:
    """Where a sequence parts from the reference, and how near a tie that was; empty when it does not."""
    error = outputs[-1].error if outputs else None
    if error is not None:
        return f"prompt of {len(reference.prompt)}: {error.message}"
    token_ids = [token for output in outputs for token in output.token_ids]
    if token_ids == reference.token_ids:
        return ""
    for index, (ours, theirs) in enumerate(zip(token_ids, reference.token_ids, strict=False)):
        if ours != theirs:
            gap = float(reference.logits[index, theirs] - reference.logits[index, ours])
            return f"prompt of {len(reference.prompt)}: output token {index} differs, logit gap {gap:.2g}"
    return f"prompt of {len(reference.prompt)}: {len(token_ids)} tokens, not {len(reference.token_ids)}"


def _logprob_difference(reference: Reference, outputs: Sequence[SequenceOutput]) -> float:
    """The largest difference of the chosen tokens' logprobs, up to where the tokens part."""
    logprobs = torch.log_softmax(reference.logits, dim=-1)
    token_ids = [token for output in outputs for token in output.token_ids]
    entries = [entry for output in outputs for entry in output.logprobs or ()]
    difference = 0.0
    for index, (ours, theirs) in enumerate(zip(token_ids, reference.token_ids, strict=False)):
        if ours != theirs:
            break
        difference = max(difference, abs(float(logprobs[index, ours]) - entries[index].logprob))
    return difference


def _one_line(failure: Exception) -> str:
    """What failed and where, on one line."""
    frame = traceback.extract_tb(failure.__traceback__)[-1]
    message = " ".join(str(failure).split())[:200]
    return f"{type(failure).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"
