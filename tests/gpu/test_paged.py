"""On a CUDA device: the paged kernel agrees with its plain twin, and engines over pages give the tokens of generate().

The tokens themselves are compared in test_lanes.py; here it is seen that pages, not slots, gave them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.attention import AttentionCall
from engine.model.loader import describe
from engine.model.paged_attention import attend_blocks, attend_kernel
from engine.model.paged_runner import PagedRunner
from tests import zoo
from tests.engine.harness import drive, greedy, tiny_model, tokens
from tests.engine.model.paged_drawings import draw

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RUNS = [(0, 1), (31, 1), (32, 1), (700, 1), (0, 300), (45, 33), (63, 2)]


@pytest.fixture(autouse=True)
def exact_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((8, 8), (128, 128)),
        ((14, 2), (64, 64)),
        ((32, 1), (16, 16)),
        ((4, 4), (24, 20)),
        ((4, 2), (192, 128)),
        ((4, 2), (256, 256)),
        ((6, 2), (80, 80)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_extras", [False, True])
def test_the_kernel_agrees_with_its_twin(
    heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, has_extras: bool
) -> None:
    drawn = draw(RUNS, heads=heads, dims=dims, dtype=dtype, device="cuda")
    call = AttentionCall(dims[0] ** -0.5, None, None, None)
    if has_extras:
        call = AttentionCall(dims[0] ** -0.5, 50, 1.5, drawn.sinks)
    got = attend_kernel(drawn.query, drawn.keys, drawn.values, drawn.inputs, call)
    wanted = attend_blocks(drawn.query.float(), drawn.keys.float(), drawn.values.float(), drawn.inputs, call)
    torch.testing.assert_close(got.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def _engine(name: str, config: dict[str, Any]) -> Engine:
    return build_engine(describe(tiny_model(name).cuda()), EngineConfig(**config), lambda _what, _share: None)


def _generate(name: str, prompt: list[int], num_tokens: int) -> list[int]:
    input_ids = torch.tensor([prompt], device="cuda")
    output = tiny_model(name).cuda().generate(input_ids, do_sample=False, max_new_tokens=num_tokens)
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 12}, {"num_pages": 10}])
def test_an_engine_keeps_pages_and_gives_the_tokens_of_generate(name: str, limits: dict[str, Any]) -> None:
    config = {"max_num_seqs": 8, "max_batch_tokens": 256, "max_model_len": 256, **limits}
    num_pages = config.pop("num_pages", None)
    if num_pages is not None:  # too few for all: some are preempted
        config["kv_budget_bytes"] = num_pages * 32 * _engine(name, config).lane.kv_bytes_per_token
    engine = _engine(name, config)
    assert isinstance(engine.runner, PagedRunner)
    prompts = [zoo.prompt(12 + 5 * n, seed=n) for n in range(6)]
    expected = [_generate(name, prompt, 120) for prompt in prompts]
    for _ in range(2):
        outputs = drive(engine, [greedy(n, prompt, 120) for n, prompt in enumerate(prompts)])
        assert [tokens(outputs[n]) for n in range(6)] == expected
    assert (engine.stats().preemptions_total > 0) == (num_pages is not None)


def test_no_step_makes_the_kernel_compile_again_once_the_engine_is_built() -> None:
    from engine.model import paged_kernel

    engine = _engine("mistral", {"max_num_seqs": 8, "max_batch_tokens": 64, "max_model_len": 256})

    def num_compiled() -> int:
        return sum(len(entry[0]) for entry in paged_kernel._paged_attention.device_caches.values())

    before = num_compiled()
    assert before > 0
    drive(engine, [greedy(n, zoo.prompt(7 * n + 1, seed=n), 60) for n in range(8)])
    assert num_compiled() == before
