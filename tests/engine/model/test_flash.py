"""Runs that begin their sequences go to flash-attn where it serves, and nothing else does; a stand-in computes here."""

from __future__ import annotations

import importlib.util
import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kv.paged import PagedStorage
from engine.kv.slots import LayerShape
from engine.model.attention import AttentionCall, attend_plain
from engine.model.flash import FlashAttention, find_flash
from engine.model.paged_attention import KernelAttention, attend_blocks
from engine.model.paged_step import PagedStep
from tests.engine.model.paged_drawings import Drawing, draw

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="no triton, or a GPU to run on instead (tests/gpu)",
)
MIXED = [(0, 70), (31, 1), (45, 33), (0, 1), (0, 2), (200, 1)]


class StandIn:
    """flash-attn's function in plain torch; notes the lengths it is asked for."""

    def __init__(self, *, window_shift: int = 0) -> None:
        self.asked: list[list[int]] = []
        self.window_shift = window_shift

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> torch.Tensor:
        assert cu_seqlens_q.dtype is torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths) and sum(lengths) == len(q) == len(k) == len(v)
        assert causal and dropout_p == 0.0 and softmax_scale is not None
        self.asked.append(lengths)
        parts = []
        for first, last in pairwise(cu_seqlens_q.tolist()):
            distance = torch.arange(last - first)[:, None] - torch.arange(last - first)
            mask = distance >= 0
            if window_size[0] >= 0:
                mask &= distance <= window_size[0] + self.window_shift
            query, key, value = (
                x[first:last].float().transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (q, k, v)
            )
            plain = AttentionCall(softmax_scale, None, softcap or None, None)
            parts.append(attend_plain(query, key, value, mask, plain).transpose(0, 1))
        return torch.cat(parts).to(q.dtype)


def _own(drawn: Drawing) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the step's tokens, which lie in the blocks already."""
    slots = drawn.inputs.slot_mapping
    key, value = (cached.flatten(0, 1)[slots].transpose(0, 1) for cached in (drawn.keys, drawn.values))
    return key, value


def _flash(varlen: StandIn) -> FlashAttention:
    return FlashAttention(varlen, KernelAttention(torch.device("cpu"), num_sms=0))


def _compare(drawn: Drawing, call: AttentionCall, varlen: StandIn) -> None:
    got = _flash(varlen)(drawn.query, drawn.keys, drawn.values, drawn.inputs, call, _own(drawn))
    wanted = attend_blocks(drawn.query.float(), drawn.keys.float(), drawn.values.float(), drawn.inputs, call)
    assert got.dtype is drawn.query.dtype
    torch.testing.assert_close(got.float(), wanted, atol=2e-2, rtol=2e-2)


@interpreted
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixed_step_is_shared_between_the_kernel_and_flash(
    window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    varlen = StandIn()
    drawn = draw(MIXED, heads=(6, 2), dtype=dtype)
    assert drawn.inputs.query_lens == (1, 1, 1, 33, 70, 2)  # singles, what goes on, what begins
    _compare(drawn, AttentionCall(0.3, window, softcap, None), varlen)
    assert varlen.asked == [[130, 67], [70, 2]]  # the trial first


@interpreted
def test_a_step_of_new_prompts_alone_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelAttention, "attend_some", lambda *_: pytest.fail("the kernel was called"))
    varlen = StandIn()
    _compare(draw([(0, 40), (0, 33)], dtype=torch.bfloat16), AttentionCall(0.3, None, None, None), varlen)
    assert varlen.asked[1:] == [[40, 33]]


@interpreted
def test_a_step_hands_flash_the_keys_and_values_that_it_writes() -> None:
    varlen = StandIn()
    drawn = draw(MIXED, dtype=torch.bfloat16)
    call = AttentionCall(0.3, None, None, None)
    wanted = attend_blocks(drawn.query.float(), drawn.keys.float(), drawn.values.float(), drawn.inputs, call)
    key, value = (own.clone() for own in _own(drawn))
    for cached in (drawn.keys, drawn.values):
        cached.flatten(0, 1)[drawn.inputs.slot_mapping] = torch.nan
    storage = PagedStorage((LayerShape(2, 16, 16, torch.bfloat16),), torch.device("cpu"))
    storage.keys, storage.values = [drawn.keys], [drawn.values]
    step = PagedStep(drawn.inputs, storage, _flash(varlen))
    got = step.attend(drawn.query.transpose(0, 1)[None], key[None], value[None], call)
    torch.testing.assert_close(got[0].float(), wanted, atol=2e-2, rtol=2e-2)
    assert varlen.asked[1:] == [[70, 2]]


@interpreted
@pytest.mark.parametrize(
    ("how", "has_sinks"),
    [
        ({"dtype": torch.float32}, False),
        ({"dims": (24, 16), "dtype": torch.bfloat16}, False),
        ({"dtype": torch.bfloat16}, True),
    ],
)
def test_what_flash_cannot_do_is_the_kernels(how: dict[str, Any], has_sinks: bool) -> None:
    varlen = StandIn()
    drawn = draw(MIXED, **how)
    _compare(drawn, AttentionCall(0.3, None, None, drawn.sinks if has_sinks else None), varlen)
    assert varlen.asked == []


@interpreted
def test_steps_without_a_new_prompt_never_reach_flash() -> None:
    varlen = StandIn()
    _compare(draw([(3, 1), (40, 20)], dtype=torch.bfloat16), AttentionCall(0.3, None, None, None), varlen)
    assert varlen.asked == []


@interpreted
def test_a_flash_that_is_wrong_is_not_used_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    varlen = StandIn(window_shift=1)
    drawn = draw(MIXED, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        _compare(drawn, AttentionCall(0.3, 20, None, None), varlen)
    assert varlen.asked == [[130, 67]]
    assert "flash-attn is not used for heads of 16 dimensions: the trial is off by" in caplog.text


@interpreted
def test_a_flash_that_raises_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(StandIn):
        def __call__(self, *_arguments: Any, **_named: Any) -> torch.Tensor:
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    with caplog.at_level(logging.WARNING):
        _compare(draw(MIXED, dtype=torch.bfloat16), AttentionCall(0.3, None, None, None), Broken())
    assert "the trial raised RuntimeError: FlashAttention only supports Ampere" in caplog.text


def _install(directory: Path, version: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "flash_attn").mkdir()
    (directory / "flash_attn" / "__init__.py").write_text(source)
    info = directory / f"flash_attn-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {version}\n")
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


@pytest.mark.parametrize(
    ("version", "source", "words"),
    [
        ("2.8.3", "def flash_attn_varlen_func(): ...", "flash-attn 2.8.3 computes runs that begin"),
        ("2.5.9.post1", "def flash_attn_varlen_func(): ...", "flash-attn 2.5.9.post1 is not used: it must be at least"),
        ("3.0.0", "def flash_attn_varlen_func(): ...", "must be at least 2.6 and below 3.0"),
        ("2.8.3", "raise ImportError('undefined symbol: _ZN3c10')", "not used: ImportError: undefined symbol"),
        ("2.8.3", "", "not used: AttributeError"),
    ],
)
def test_flash_is_found_by_version_and_by_importing_it(
    version: str,
    source: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _install(tmp_path, version, source, monkeypatch)
    with caplog.at_level(logging.INFO):
        found = find_flash(torch.device("cuda"))
    assert words in caplog.text
    assert (found is not None) == ("computes" in words)


def test_a_cpu_has_no_flash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "2.8.3", "def flash_attn_varlen_func(): ...", monkeypatch)
    assert find_flash(torch.device("cpu")) is None
