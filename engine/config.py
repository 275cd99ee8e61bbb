"""What the engine is told when it is built: limits and budgets, all resolved.

Knows nothing of flags, environment or models' names; no torch here.
Made by model_manager from Settings and what the loaded model says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """How decode steps are compiled.

    Args:
        directory: where compiled code is kept between starts.
        is_autotuned: whether kernels are chosen by measuring, which takes longer (--torch-compile-mode max-autotune).
        has_graphs: whether steps are captured as CUDA graphs too (--torch-compile-mode reduce-overhead, max-autotune).
        has_code: whether steps are compiled at all; False to capture them as they are.
        sizes: numbers of rows that steps are compiled for; None for powers of two up to max_num_seqs, and that.
    """

    directory: Path
    is_autotuned: bool = False
    has_graphs: bool = False
    has_code: bool = True
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine.

    Args:
        max_num_seqs: most sequences in one step (--continuous-batching-batch-size).
        max_batch_tokens: token budget of one step (--max-batch-tokens).
        max_model_len: most tokens, prompt and output together, of one sequence.
        max_source_len: most positions of an encoder's output (--static-cache-encoder-max-length where the cache is
            static); None for a model without encoder.
        kv_budget_bytes: most bytes of KV storage at any time (--kv-cache-memory); None for no bound of its own.
        kv_limits: most bytes of it on each device, for a model that is spread over several; None for one that is not.
        is_prefix_caching: whether finished sequences' KV may serve later prompts (--prefix-caching).
        is_static_cache: one slot of max_model_len tokens for each of max_num_seqs, allocated when the engine is built.
        eos_token_ids: tokens that end a sequence unless it ignores EOS.
        profile_directory: where a few steps' traces go (--torch-profiling); None for no profiling.
        compile: how decode steps are compiled (--torch-compile); None for not at all.
        is_overlapped: whether a decode step is launched before the tokens of the last one are read. Where the host is
            the device that gains nothing.
    """

    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    max_source_len: int | None = None
    kv_budget_bytes: int | None = None
    kv_limits: Mapping[str, int] | None = None
    is_prefix_caching: bool = True
    is_static_cache: bool = False
    eos_token_ids: frozenset[int] = frozenset()
    profile_directory: Path | None = None
    compile: CompileConfig | None = None
    is_overlapped: bool = False
