"""Serves a tiny model of every causal language model type of transformers and compares with generate(), token by token.

Knows nothing of HTTP; drives the engine in-process, in child processes so that one crash or hang ends one type only.
Called as `python -m benchmarks.census`, which writes benchmarks/results/census.md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.census_case import CaseResult, run_case
from benchmarks.report import table

RESULTS_PATH = Path(__file__).parent / "results" / "census.md"
GROUP_SIZE = 16  # types in one child process: importing transformers takes longer than most of them


def run_types(types: Sequence[str], timeout_s: float) -> Iterator[CaseResult]:
    """Run every type in child processes; one that kills its process or takes too long is a result, not an end."""
    left = list(types)
    while left:
        group = left[:GROUP_SIZE]
        results, ending = _run_group(group, timeout_s)
        yield from results
        left = left[len(results) :]
        if len(results) < len(group):
            # The child ended inside the first type that it did not report.
            yield CaseResult(left.pop(0), outcome="crash", why=ending)


def _run_group(group: Sequence[str], timeout_s: float) -> tuple[list[CaseResult], str]:
    """The results of one child process, and how it ended."""
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl", encoding="utf-8") as report:
        command = [sys.executable, "-m", "benchmarks.census", "--worker", report.name, *group]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s * len(group), check=False)
            ending = f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
        except subprocess.TimeoutExpired:
            ending = f"not done in {timeout_s * len(group):.0f} s"
        return [CaseResult(**json.loads(line)) for line in report], ending


def _work(report: Path, types: Sequence[str]) -> None:
    """The child's part: run the types and append each result to `report`."""
    transformers.utils.logging.set_verbosity_error()
    with report.open("a", encoding="utf-8") as file:
        for model_type in types:
            file.write(json.dumps(dataclasses.asdict(run_case(model_type))) + "\n")
            file.flush()


def as_markdown(results: Sequence[CaseResult]) -> str:
    """The census as a page: totals, then a row a type."""
    counts = collections.Counter(result.outcome for result in results)
    lanes = collections.Counter(result.lane for result in results if result.outcome == "exact")
    totals = ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
    by_lane = ", ".join(f"{number} {lane}" for lane, number in lanes.most_common())
    rows = [
        (
            f"{result.model_type}",
            result.architecture,
            result.lane,
            result.outcome,
            "" if result.num_distinct is None else str(result.num_distinct),
            "" if result.logprob_difference is None else f"{result.logprob_difference:.0e}",
            result.why.replace("|", "/").replace("\n", " "),
        )
        for result in sorted(results, key=lambda result: result.model_type)
    ]
    return f"""# Census of architectures

transformers {transformers.__version__}: {len(results)} types of its causal language model mapping; {totals}.
Of the exact ones, by lane: {by_lane}.

Each type is a tiny random model in float32. Five requests of different lengths, two with a common prefix, arrive a few
steps apart, are prefilled in chunks and share batches; *exact* means that the tokens of each are those of `generate()`.
Rules of a type's generation config that force or suppress tokens are switched off for both.
*distinct* is the number of different tokens in the outputs (a model that repeats itself proves less), *logprob* the
largest difference of the chosen tokens' log-probabilities. *no generate()* means that transformers itself does not run
the type from token ids; the reason follows. Written by `python -m benchmarks.census`.

{table(("type", "class", "lane", "result", "distinct", "logprob", "why"), rows, left=(0, 1, 2, 3, 6))}
"""


def main() -> None:
    """Run the census, or as a child its part of it."""
    parser = argparse.ArgumentParser(description="Compare the engine with generate() for every architecture.")
    parser.add_argument("types", nargs="*", help="model types (default: all, and only then the page is written)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds a type may take (default: 60)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker, arguments.types)
        return
    results = []
    for result in run_types(arguments.types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), arguments.timeout):
        results.append(result)
        sys.stdout.write(f"{result.model_type:24} {result.lane:6} {result.outcome:14} {result.why}\n")
        sys.stdout.flush()
    if not arguments.types:
        RESULTS_PATH.parent.mkdir(exist_ok=True)
        RESULTS_PATH.write_text(as_markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
