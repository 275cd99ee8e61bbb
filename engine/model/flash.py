"""Attention of runs that begin their sequences by flash-attn, where it is installed and does what it should.

Knows nothing of models or scheduling. flash-attn's pages are larger than ours, so it is never given any: a run that
begins a sequence sees nothing but itself, and its K and V are at hand before they are in pages.
Found by model/paged_attention.py; single tokens, runs that go on, and what it cannot do are left to the kernel there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Hashable
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import torch

from engine.model.attention import AttentionCall, attend_plain
from engine.model.paged_inputs import PagedInputs

if TYPE_CHECKING:
    from engine.model.paged_attention import KernelAttention
    from engine.model.paged_step import OwnTokens

logger = logging.getLogger(__name__)

MIN_VERSION, BELOW_VERSION = (2, 6), (3, 0)  # the first with a softcap; the next has other names
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16)
TOLERANCE = 3e-2
_TRIAL_LENS = (130, 67)  # past its tiles, and within one
_TRIAL_WINDOW = 24


class Varlen(Protocol):
    """flash-attn's function for sequences of different lengths that lie one after the other."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
    ) -> torch.Tensor:
        """From [T, H, D] and the int32 starts of the sequences to [T, H, D]."""


def find_flash(device: torch.device) -> Varlen | None:
    """flash-attn's function, where it is installed for this device and can be imported; the log says what is."""
    if device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        version = importlib.metadata.version("flash_attn")
        numbers = tuple(int(part) for part in version.split(".")[:2])
        if not MIN_VERSION <= numbers < BELOW_VERSION:
            least, below = (".".join(map(str, bound)) for bound in (MIN_VERSION, BELOW_VERSION))
            logger.warning("flash-attn %s is not used: it must be at least %s and below %s", version, least, below)
            return None
        varlen: Varlen = import_module("flash_attn").flash_attn_varlen_func
    except Exception as failure:  # built for another torch, another CUDA: there is no end to it
        words = " ".join(str(failure).split())[:200]
        logger.warning("flash-attn is installed but not used: %s: %s", type(failure).__name__, words)
        return None
    logger.info("flash-attn %s computes runs that begin their sequences, where a trial agrees", version)
    return varlen


class FlashAttention:
    """The kernel, with flash-attn for what that can do.

    Args:
        varlen: flash-attn's function.
        kernel: for everything else.
    """

    def __init__(self, varlen: Varlen, kernel: KernelAttention) -> None:
        self._varlen = varlen
        self._kernel = kernel
        self._agrees: dict[Hashable, bool] = {}

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: PagedInputs,
        call: AttentionCall,
        own: OwnTokens | None = None,
    ) -> torch.Tensor:
        """As attend_blocks has it."""
        runs = inputs.new_runs()
        if runs is None or own is None or not self._serves(query, *own, call):
            return self._kernel(query, keys, values, inputs, call, own)
        key, value = (tensor[:, runs.first :].transpose(0, 1) for tensor in own)
        result = self._attend(query[runs.first :], key, value, runs.starts, runs.longest, call)
        if runs.first == 0:
            return result
        out = query.new_empty((query.shape[0], query.shape[1], value.shape[2]))
        self._kernel.attend_some(query, keys, values, inputs, call, out, runs.num_old)
        out[runs.first :] = result
        return out

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        call: AttentionCall,
    ) -> torch.Tensor:
        query, key, value = (
            tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)
        )
        return self._varlen(
            query,
            key,
            value,
            starts,
            starts,
            longest,
            longest,
            softmax_scale=call.scaling,
            causal=True,
            # Theirs counts the keys before the query's own.
            window_size=(-1 if call.window is None else call.window - 1, 0),
            softcap=0.0 if call.softcap is None else call.softcap,
        )

    def _serves(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> bool:
        """Whether flash-attn can do this and was seen to, at the first call of its kind, while an engine is built."""
        heads = query.shape[1], key.shape[0]
        dims = query.shape[2], value.shape[2]
        if query.dtype not in DTYPES or dims[0] != dims[1] or dims[0] > MAX_HEAD_DIM:
            return False
        if call.sinks is not None or call.bias is not None:
            return False
        kind = (heads, dims, query.dtype, call.window is None, call.softcap)
        if kind not in self._agrees:
            trial = AttentionCall(
                dims[0] ** -0.5, None if call.window is None else min(call.window, _TRIAL_WINDOW), call.softcap, None
            )
            reason = self._why_not(heads, dims[0], query, trial)
            self._agrees[kind] = reason is None
            if reason is not None:
                logger.warning("flash-attn is not used for heads of %d dimensions: %s", dims[0], reason)
        return self._agrees[kind]

    def _why_not(self, heads: tuple[int, int], dim: int, like: torch.Tensor, call: AttentionCall) -> str | None:
        """Compare with plain attention on two runs drawn at random; what is wrong, or None."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(sum(_TRIAL_LENS), num_heads, dim, generator=generator).to(like)
            for num_heads in (heads[0], heads[1], heads[1])
        )
        starts = torch.tensor([0, _TRIAL_LENS[0], sum(_TRIAL_LENS)], dtype=torch.int32, device=like.device)
        try:
            got = self._attend(query, key, value, starts, max(_TRIAL_LENS), call)
        except Exception as failure:  # whatever it says of this card or these heads: the kernel serves
            return f"the trial raised {type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        bounds = (slice(0, _TRIAL_LENS[0]), slice(_TRIAL_LENS[0], None))
        query, key, value = query.float(), key.float(), value.float()
        wanted = torch.cat([_attend_run(query[part], key[part], value[part], call) for part in bounds])
        if got.shape != wanted.shape:
            return f"the trial gave {list(got.shape)}, not {list(wanted.shape)}"
        error = float((got.float() - wanted).abs().max())
        return None if error <= TOLERANCE else f"the trial is off by {error:.1e}"


def _attend_run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Causal attention of one run from its beginning, plainly: [T, H, D] from [T, H, D] and [T, Hkv, D]."""
    group = query.shape[1] // key.shape[1]
    positions = torch.arange(query.shape[0], device=query.device)
    mask = positions <= positions[:, None]
    if call.window is not None:
        mask &= positions > positions[:, None] - call.window
    key, value = (tensor.transpose(0, 1).repeat_interleave(group, 0) for tensor in (key, value))
    return attend_plain(query.transpose(0, 1), key, value, mask, call).transpose(0, 1)
