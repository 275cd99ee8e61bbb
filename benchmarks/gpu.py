"""How near the engine comes to what the card can do: steps of real shapes beside the least time they could take.

Knows nothing of servers; weights are random and made on the device, prompts are random token ids.
Called as `python -m benchmarks.gpu`, on a machine with a CUDA device only; `--quick` for the cells that say most.

Every measurement is a line as it is made, and the table of a model is written when all of its are: whoever stops this
loses one model's table, and no figure.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_bounds import Bound, Ceilings, Costs
from benchmarks.gpu_models import GPU_SHAPES, GROUP_SIZE, Weights, make_model
from benchmarks.gpu_steps import Card, Limits, NotServed, Steps, Way, kv_budget_bytes, num_positions
from benchmarks.report import table
from engine.model.loader import LoadedModel

BATCHES = (1, 8, 64, 256)
CONTEXTS = (128, 2048)
PREFILL_TOKENS = 2048
WAYS: tuple[Way, ...] = ("eager", "graphs", "compiled")
SPARE_BYTES = 4 << 30  # for activations, logits and graphs
HEADER = (
    "shape", "weights", "step", "batch", "context", *(f"{way}, ms" for way in WAYS),
    "best, tokens/s", "bound, ms", "bound by", "best of bound",
)  # fmt: skip
LEFT = (0, 1, 2, 10)


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of step: decode of `batch` sequences that have `context` tokens, or a prompt of `context` tokens."""

    batch: int
    context: int
    is_prefill: bool = False

    @property
    def name(self) -> str:
        """For a line."""
        return f"prefill {self.context}" if self.is_prefill else f"decode {self.batch} x {self.context}"

    @property
    def num_tokens(self) -> int:
        """That a step gives, or reads."""
        return self.context if self.is_prefill else self.batch


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Args:
        cells: kinds of steps, in the order in which they are measured.
        ways: columns that are filled.
        num_steps: decode steps that are timed for each.
        cache: where compiled code is kept.
        compile_s: how long compiled code of one model is waited for.
    """

    cells: tuple[Cell, ...]
    ways: tuple[Way, ...]
    num_steps: int
    cache: Path
    compile_s: float

    def limits(self, costs: Costs, free_bytes: int) -> Limits:
        """What an engine for these cells takes: as much KV as the largest that fits."""
        needs = [self.kv_bytes(cell, costs) for cell in self.cells]
        budget = max((need for need in needs if need + SPARE_BYTES <= free_bytes), default=0)
        return Limits(
            sizes=tuple(sorted({cell.batch for cell in self.cells})),
            num_steps=self.num_steps,
            max_context=max(cell.context for cell in self.cells),
            prefill_tokens=max((cell.context for cell in self.cells if cell.is_prefill), default=1),
            kv_budget_bytes=budget,
            cache=self.cache,
            compile_s=self.compile_s,
        )

    def kv_bytes(self, cell: Cell, costs: Costs) -> int:
        """KV memory while a cell is measured."""
        num_tokens = cell.batch * num_positions(cell.context, 0 if cell.is_prefill else self.num_steps)
        return kv_budget_bytes(costs.kv_bytes(num_tokens), costs.kv_bytes(1))


def measure_ceilings(card: Card, *, num_copied_bytes: int = 1 << 30, size: int = 8192) -> Ceilings:
    """Copy bandwidth, and the rate of a square bfloat16 product."""
    source = torch.zeros(num_copied_bytes, dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    copy_s = card.median_s(lambda: target.copy_(source), 20)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=card.device) for _ in range(2))
    product_s = card.median_s(lambda: left @ right, 20)
    return Ceilings(2 * num_copied_bytes / copy_s, 2.0 * size**3 / product_s)


def measure(
    loaded: LoadedModel, costs: Costs, card: Card, plan: Plan, free_bytes: int
) -> Iterator[tuple[Cell, Way, float | str]]:
    """Each cell in each way: seconds of a step, or why there are none."""
    limits = plan.limits(costs, free_bytes)
    for way in plan.ways:
        steps = Steps(loaded, way, limits, card)
        for cell in plan.cells:
            needed = plan.kv_bytes(cell, costs)
            if needed > limits.kv_budget_bytes:
                yield cell, way, f"KV of {needed / 1e9:.1f} GB does not fit"
                continue
            try:
                yield cell, way, steps.prefill_s() if cell.is_prefill else steps.decode_s(cell.batch, cell.context)
            except NotServed as refusal:
                yield cell, way, str(refusal)
            except Exception as failure:  # out of memory, most likely: the other cells are measured all the same
                steps.close()
                words = " ".join(str(failure).split())[:120]
                yield cell, way, f"{type(failure).__name__}: {words}"
        steps.close()


def rows(
    name: str, weights: Weights, plan: Plan, costs: Costs, ceilings: Ceilings, times: dict[tuple[Cell, Way], float]
) -> list[tuple[str, ...]]:
    """A line of the table for each cell: milliseconds of each way, "-" for none, and the best beside the bound."""
    lines = []
    for cell in plan.cells:
        taken = {way: times[cell, way] for way in WAYS if (cell, way) in times}
        bound = bound_of(cell, plan, costs, ceilings)
        best = min(taken.values(), default=None)
        lines.append((
            name, weights, "prefill" if cell.is_prefill else "decode", str(cell.batch), str(cell.context),
            *(f"{taken[way] * 1e3:.2f}" if way in taken else "-" for way in WAYS),
            "-" if best is None else f"{cell.num_tokens / best:.0f}",
            f"{bound.seconds * 1e3:.2f}",
            bound.by,
            "-" if best is None else f"{bound.seconds / best:.0%}",
        ))  # fmt: skip
    return lines


def bound_of(cell: Cell, plan: Plan, costs: Costs, ceilings: Ceilings) -> Bound:
    """The least time of a cell's step; a decode step's is that of the middle of those that are timed."""
    if cell.is_prefill:
        return costs.prefill(cell.context, ceilings)
    return costs.decode(cell.batch, cell.context + plan.num_steps / 2, ceilings)


def run_model(name: str, weights: Weights, card: Card, ceilings: Ceilings, plan: Plan) -> list[tuple[str, ...]]:
    """Make a model and measure it; a line for each measurement, and the rows of the table."""
    started_s = time.monotonic()
    try:
        loaded = make_model(GPU_SHAPES[name], card.device, weights, plan.cache)
    except (RuntimeError, ValueError) as failure:
        say(f"{name} {weights}: {' '.join(str(failure).split())[:200]}")
        return []
    card.wait()
    free_bytes = torch.cuda.mem_get_info()[0] if card.device.type == "cuda" else 64 << 30
    say(f"{name} {weights}: {loaded.num_bytes / 1e9:.2f} GB, made in {time.monotonic() - started_s:.0f} s")
    costs = Costs.of(GPU_SHAPES[name], int4_group_size=GROUP_SIZE if weights == "int4" else None)
    times: dict[tuple[Cell, Way], float] = {}
    for cell, way, result in measure(loaded, costs, card, plan, free_bytes):
        if isinstance(result, str):
            say(f"{name} {weights} {cell.name} {way}: - ({result})")
            continue
        times[cell, way] = result
        share = bound_of(cell, plan, costs, ceilings).seconds / result
        say(f"{name} {weights} {cell.name} {way}: {result * 1e3:.2f} ms, {share:.0%} of the bound")
    return rows(name, weights, plan, costs, ceilings, times)


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def make_plan(arguments: argparse.Namespace) -> Plan:
    """What the command line asks for."""
    batches, contexts = tuple(arguments.batches or BATCHES), tuple(arguments.contexts or CONTEXTS)
    if arguments.quick:
        batches, contexts = tuple(arguments.batches or (1, 64)), tuple(arguments.contexts or (128,))
    ways: tuple[Way, ...] = tuple(arguments.ways or (WAYS[:2] if arguments.quick else WAYS))
    cells = [Cell(batch, context) for context in contexts for batch in batches]
    cells.append(Cell(1, arguments.prefill, is_prefill=True))
    num_steps = arguments.steps or (16 if arguments.quick else 32)
    return Plan(tuple(cells), ways, num_steps, arguments.cache, arguments.compile_seconds)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the engine on a GPU beside what the GPU can do.")
    parser.add_argument("shapes", nargs="*", default=list(GPU_SHAPES), help=f"of {', '.join(GPU_SHAPES)}; all if none")
    parser.add_argument("--quick", action="store_true", help="batches 1 and 64 at 128 tokens, not compiled, 16 steps")
    parser.add_argument("--weights", nargs="+", choices=("bf16", "int4"), default=["bf16", "int4"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="how steps run; all if not given")
    parser.add_argument("--batches", nargs="+", type=int, help=f"{BATCHES} if not given")
    parser.add_argument("--contexts", nargs="+", type=int, help=f"{CONTEXTS} if not given")
    parser.add_argument("--prefill", type=int, default=PREFILL_TOKENS, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, help="decode steps timed for each batch and context")
    parser.add_argument("--cache", type=Path, default=Path("build/compiled"), help="where compiled code is kept")
    parser.add_argument("--compile-seconds", type=float, default=600, help="how long a model's compiling may take")
    parser.add_argument("--log", default="WARNING", help="level of the engine's log")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.shapes) - set(GPU_SHAPES))
    if unknown:
        parser.error(f"unknown shape {unknown[0]!r}; there are {', '.join(GPU_SHAPES)}")
    return arguments


def main() -> None:
    """Measure the card, then the engine on it."""
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch sees no CUDA device here; benchmarks.offline times the engine on a CPU")
    logging.basicConfig(level=arguments.log.upper(), format="%(message)s", stream=sys.stdout)
    card = Card(torch.device("cuda"))
    ceilings = measure_ceilings(card)
    say(
        f"{torch.cuda.get_device_name()}: copies {ceilings.bytes_per_s / 1e9:.0f} GB/s, "
        f"bfloat16 products {ceilings.flops_per_s / 1e12:.0f} TFLOP/s; torch {torch.__version__}"
    )
    plan = make_plan(arguments)
    lines: list[tuple[str, ...]] = []
    for name in arguments.shapes:
        for weights in arguments.weights:
            made = run_model(name, weights, card, ceilings, plan)
            lines += made
            if made:
                say(table(HEADER, made, left=LEFT))
            torch.cuda.empty_cache()
    say(table(HEADER, lines, left=LEFT))


if __name__ == "__main__":
    main()
