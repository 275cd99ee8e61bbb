"""How near the engine comes to what the card can do: steps of real shapes beside the least time they could take.

Knows nothing of servers; weights are random and made on the device, prompts are random token ids.
Called as `python -m benchmarks.gpu`, on a machine with a CUDA device only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_bounds import Bound, Ceilings, Costs
from benchmarks.models import SHAPES, Shape, randomise
from benchmarks.report import table
from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv.paged import PagedStorage
from engine.kv.prefix import BLOCK_SIZE
from engine.model.loader import LoadedModel, describe
from engine.sequence import SamplingParams, Sequence, SequenceState

GPU_SHAPES = {
    "llama-2-7b": Shape(
        "llama",
        32_000,
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11_008,
            "max_position_embeddings": 4096,
        },
    ),
    "qwen-0.5b": SHAPES["qwen-0.5b"],
}
BATCHES = (1, 8, 64, 256)
CONTEXTS = (128, 2048)
PREFILL_TOKENS = 2048
WARM_UPS = 3
SPARE_BYTES = 2 << 30  # for activations and logits
HEADER = ("shape", "step", "batch", "context", "ms", "tokens/s", "bound ms", "bound by", "of bound")


@dataclass(frozen=True, slots=True)
class Card:
    """The device, and how to wait for it."""

    device: torch.device
    wait: Callable[[], None] = field(default=torch.cuda.synchronize)

    def median_s(self, work: Callable[[], object], repeats: int) -> float:
        """Seconds that `work` takes, the median of `repeats`."""
        for _ in range(WARM_UPS):
            work()
        times = []
        for _ in range(repeats):
            self.wait()
            started_s = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started_s)
        return statistics.median(times)


def measure_ceilings(card: Card, *, num_copied_bytes: int = 1 << 30, size: int = 8192) -> Ceilings:
    """Copy bandwidth, and the rate of a square bfloat16 product."""
    source = torch.zeros(num_copied_bytes, dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    copy_s = card.median_s(lambda: target.copy_(source), 20)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=card.device) for _ in range(2))
    product_s = card.median_s(lambda: left @ right, 20)
    return Ceilings(2 * num_copied_bytes / copy_s, 2.0 * size**3 / product_s)


def make_model(shape: Shape, device: torch.device) -> LoadedModel:
    """A bfloat16 model of `shape`, its weights made where it lives."""
    config = AutoConfig.for_model(shape.model_type, vocab_size=shape.vocab_size, eos_token_id=None, **shape.values)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    randomise(model)
    return describe(model)


def num_positions(context: int, num_steps: int) -> int:
    """KV positions that a sequence of `context` tokens takes while so many steps are timed, in whole blocks."""
    return -(-(context + WARM_UPS + num_steps + 2) // BLOCK_SIZE) * BLOCK_SIZE


def decode_s(loaded: LoadedModel, costs: Costs, card: Card, batch: int, context: int, num_steps: int) -> float:
    """Seconds of one step of `batch` sequences that have `context` tokens; the median of `num_steps`."""
    num_tokens = num_positions(context, num_steps)
    # The budget is exactly what they take: memory that grows by doubling would not fit where they do.
    engine = _engine(loaded, batch, num_tokens, kv_budget_bytes=costs.kv_bytes(batch * num_tokens))
    for number in range(batch):
        _start_at(engine, _sequence(number, context + 1, num_steps + WARM_UPS + 1, loaded.vocab_size), num_tokens)
    engine.runner.apply(engine.kv.take_ops())
    storage = getattr(engine.runner, "storage", None)
    if isinstance(storage, PagedStorage):
        for tensor in (*storage.keys, *storage.values):
            tensor.zero_()  # never computed: zeros cost what values cost, and are no NaN
    seconds = card.median_s(lambda: _step(engine, batch), num_steps)
    engine.close()
    return seconds


def prefill_s(loaded: LoadedModel, card: Card, num_tokens: int, repeats: int) -> float:
    """Seconds from a prompt of `num_tokens` to its first token, when it is alone; the median of `repeats`."""
    engine = _engine(loaded, 1, num_tokens + 2)
    numbers = iter(range(repeats + WARM_UPS))

    def work() -> None:
        engine.add(_sequence(next(numbers), num_tokens, 1, loaded.vocab_size))
        _step(engine, 1)

    seconds = card.median_s(work, repeats)
    engine.close()
    return seconds


def rows(
    name: str, loaded: LoadedModel, costs: Costs, card: Card, ceilings: Ceilings, *, num_steps: int, free_bytes: int
) -> Iterable[tuple[str, ...]]:
    """One line of the table a measurement; those whose KV does not fit `free_bytes` say so."""
    for context in CONTEXTS:
        for batch in BATCHES:
            num_bytes = costs.kv_bytes(batch * num_positions(context, num_steps))
            if num_bytes + SPARE_BYTES > free_bytes:
                yield (
                    name,
                    "decode",
                    str(batch),
                    str(context),
                    f"KV of {num_bytes / 1e9:.1f} GB does not fit",
                    *[""] * 4,
                )
                continue
            seconds = decode_s(loaded, costs, card, batch, context, num_steps)
            bound = costs.decode(batch, context + num_steps / 2, ceilings)
            yield (name, "decode", str(batch), str(context), *_figures(seconds, batch, bound))
    seconds = prefill_s(loaded, card, PREFILL_TOKENS, 10)
    bound = costs.prefill(PREFILL_TOKENS, ceilings)
    yield (name, "prefill", "1", str(PREFILL_TOKENS), *_figures(seconds, PREFILL_TOKENS, bound))


def _figures(seconds: float, num_tokens: int, bound: Bound) -> tuple[str, ...]:
    share = f"{bound.seconds / seconds:.0%}"
    return f"{seconds * 1e3:.2f}", f"{num_tokens / seconds:.0f}", f"{bound.seconds * 1e3:.2f}", bound.by, share


def _engine(loaded: LoadedModel, batch: int, num_tokens: int, *, kv_budget_bytes: int | None = None) -> Engine:
    # The engine before left its own attention in the model, which a new one's check must compare with the plain one.
    loaded.model.set_attn_implementation("sdpa")
    config = EngineConfig(
        max_num_seqs=batch,
        max_batch_tokens=max(batch, num_tokens),
        max_model_len=num_tokens,
        kv_budget_bytes=kv_budget_bytes,
        is_prefix_caching=False,
    )
    return build_engine(loaded, config, lambda _what, _share: None)


def _sequence(number: int, num_tokens: int, num_new_tokens: int, vocab_size: int) -> Sequence:
    prompt = [(7 * position + number) % vocab_size for position in range(num_tokens)]
    params = SamplingParams(max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True)
    return Sequence(number, prompt, params, arrival_time_s=time.monotonic())


def _start_at(engine: Engine, sequence: Sequence, num_tokens: int) -> None:
    """Let a sequence run as if all of its prompt but the last token were computed, with room for `num_tokens`."""
    if not engine.kv.admit(sequence) or not engine.kv.ensure(sequence, num_tokens):
        raise RuntimeError(f"no KV memory for {num_tokens} tokens of sequence {sequence.sequence_id}")
    sequence.num_computed_tokens = len(sequence.prompt_token_ids) - 1
    engine.kv.commit(sequence)
    sequence.state = SequenceState.RUNNING
    engine.scheduler.running.append(sequence)


def _step(engine: Engine, num_expected: int) -> None:
    outputs = engine.step()
    failed = [output.error for output in outputs if output.error is not None]
    if failed:
        raise failed[0]
    if len(outputs) != num_expected:
        raise RuntimeError(f"the step gave {len(outputs)} tokens, not {num_expected}")


def main() -> None:
    """Measure the card, then the engine on it."""
    parser = argparse.ArgumentParser(description="Time the engine on a GPU beside what the GPU can do.")
    parser.add_argument("shapes", nargs="*", default=list(GPU_SHAPES), help=f"of {', '.join(GPU_SHAPES)}; all if none")
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed for each batch and context")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.shapes) - set(GPU_SHAPES))
    if unknown:
        parser.error(f"unknown shape {unknown[0]!r}; there are {', '.join(GPU_SHAPES)}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch sees no CUDA device here; benchmarks.offline times the engine on a CPU")
    card = Card(torch.device("cuda"))
    ceilings = measure_ceilings(card)
    sys.stdout.write(
        f"{torch.cuda.get_device_name()}: copies {ceilings.bytes_per_s / 1e9:.0f} GB/s, "
        f"bfloat16 products {ceilings.flops_per_s / 1e12:.0f} TFLOP/s; torch {torch.__version__}\n"
    )
    lines: list[tuple[str, ...]] = []
    for name in arguments.shapes:
        shape = GPU_SHAPES[name]
        loaded = make_model(shape, card.device)
        free_bytes = torch.cuda.mem_get_info()[0]
        costs = Costs.of(shape)
        lines += rows(name, loaded, costs, card, ceilings, num_steps=arguments.steps, free_bytes=free_bytes)
        del loaded
        torch.cuda.empty_cache()
    sys.stdout.write(table(HEADER, lines, left=(0, 1, 7)) + "\n")


if __name__ == "__main__":
    main()
