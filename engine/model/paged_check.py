"""Tries the paged kernel on the device itself, on lengths that a model's own trial does not reach.

Knows nothing of models: heads, dtype and what scores go through are those of a call that is about to be made.
Called by model/paged_attention.py at the first call of a kind, while an engine is built, so that all that a step may
need of the kernel is compiled then, and no request waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.kv.prefix import BLOCK_SIZE
from engine.model.attention import AttentionCall
from engine.model.paged_inputs import PagedInputs, to_device

if TYPE_CHECKING:
    Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PagedInputs, AttentionCall], torch.Tensor]

_RUNS = ((299, 1), (64, 1), (150, 50))  # (start, tokens): keys for several tiles, and for several parts
_WINDOW = 100
_TOLERANCE = 3e-2  # of bfloat16's rounding; what is wrong is wrong by more


class KernelDisagrees(Exception):
    """The kernel computes something else than its twin, on this device."""


def check_kernel(
    kernels: Iterable[Attend],
    twin: Attend,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    call: AttentionCall,
) -> None:
    """Compare kernels with their twin on random tokens.

    Args:
        kernels: one, in the ways it may go about it.
        twin: of all of them.
        query, keys, values, call: of a call; only heads, dimensions, dtype and device are taken of the tensors, and a
            window is made short enough to be reached.

    Raises:
        KernelDisagrees: they differ by more than rounding.
    """
    device, dtype = query.device, query.dtype
    inputs = _inputs(device)
    generator = torch.Generator().manual_seed(0)
    num_blocks = int(inputs.block_tables.max()) + 1
    drawn = [
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in (
            (sum(count for _, count in _RUNS), *query.shape[1:]),
            (num_blocks, BLOCK_SIZE, *keys.shape[2:]),
            (num_blocks, BLOCK_SIZE, *values.shape[2:]),
        )
    ]
    tried = replace(
        call, scaling=query.shape[2] ** -0.5, window=None if call.window is None else min(call.window, _WINDOW)
    )
    wanted = twin(*(tensor.float() for tensor in drawn), inputs, tried)  # type: ignore[call-arg, arg-type]
    for kernel in kernels:
        got = kernel(drawn[0], drawn[1], drawn[2], inputs, tried)
        error = float((got.float() - wanted).abs().max())
        if not error <= _TOLERANCE:
            raise KernelDisagrees(f"the paged kernel is off by {error:.1e} for heads of {query.shape[2]} dimensions")


def _inputs(device: torch.device) -> PagedInputs:
    lengths = tuple(start + count for start, count in _RUNS)
    query_lens = tuple(count for _, count in _RUNS)
    width = -(-max(lengths) // BLOCK_SIZE)
    order = np.random.default_rng(0).permutation(len(_RUNS) * width).astype(np.int64)
    ids = np.zeros(sum(query_lens), np.int64)
    parts = to_device([ids, np.cumsum([0, *query_lens]), np.array(lengths, np.int64), order], device)
    return PagedInputs(
        items=(),
        input_ids=parts[0][None],
        position_ids=parts[0][None],
        logit_rows=parts[0],
        slot_mapping=parts[0],
        query_starts=parts[1],
        context_lens=parts[2],
        block_tables=parts[3].view(len(_RUNS), width),
        num_singles=query_lens.count(1),
        query_lens=query_lens,
        lengths=lengths,
    )
