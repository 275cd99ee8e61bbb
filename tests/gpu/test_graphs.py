"""On a CUDA device: captured steps give the tokens of generate(), whatever else uses the device's memory meanwhile.

float32 without TF32, as in test_lanes.py. Compiled code is wanted where its own test wants it, and nowhere else.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.compile.paged_trial import NUM_TRIAL_BLOCKS
from engine.config import CompileConfig, EngineConfig
from engine.engine import Engine
from engine.graphs.recorder import Compute, CudaRecorder
from engine.graphs.steps import GraphedSteps
from engine.kv.prefix import BLOCK_SIZE
from engine.model.loader import describe
from engine.model.paged_runner import PagedRunner
from tests import zoo
from tests.engine.harness import drive, greedy, tiny_model, tokens

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SIZES = (1, 2, 4, 8)
LENGTHS = (5, 40, 90, 3, 70, 1, 64, 33, 12, 100)
NUM_TOKENS = 24


def _engine(name: str, directory: Path, dtype: torch.dtype = torch.float32, **limits: Any) -> Engine:
    how = CompileConfig(directory, has_code=False, has_graphs=True)
    config = EngineConfig(
        **{"max_num_seqs": 8, "max_batch_tokens": 256, "max_model_len": 256, "compile": how, **limits}
    )
    return build_engine(describe(tiny_model(name).to("cuda", dtype)), config, lambda _what, _share: None)


def _captured(engine: Engine) -> Engine:
    while engine.has_work():
        assert engine.step() == []
    return engine


def _generate(name: str, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    input_ids = torch.tensor([prompt], device="cuda")
    output = tiny_model(name).cuda().generate(input_ids, do_sample=False, max_new_tokens=num_tokens)
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def _prompts() -> list[list[int]]:
    return [zoo.prompt(length, seed=number) for number, length in enumerate(LENGTHS)]


def _serve(engine: Engine, prompts: list[list[int]], num_tokens: int = NUM_TOKENS, **more: Any) -> list[list[int]]:
    outputs = drive(engine, [greedy(n, prompt, num_tokens) for n, prompt in enumerate(prompts)], **more)
    return [tokens(outputs[n]) for n in range(len(prompts))]


@pytest.mark.parametrize("is_overlapped", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gpt2"])
def test_tokens_are_those_of_generate_in_graphs_of_every_size(name: str, is_overlapped: bool, tmp_path: Path) -> None:
    expected = [_generate(name, prompt) for prompt in _prompts()]
    engine = _engine(name, tmp_path, is_overlapped=is_overlapped)
    for stagger in (1, 3):  # the first time while they are captured
        assert _serve(engine, _prompts(), stagger=stagger) == expected
        assert engine.stats().graph_batch_sizes == SIZES
    used = _count_replays(engine)
    for num_rows in range(1, 9):
        assert _serve(engine, _prompts()[:num_rows], stagger=1) == expected[:num_rows]
    assert set(used) == set(SIZES)
    engine.close()


def _count_replays(engine: Engine) -> list[int]:
    """Fills with the size of each graph that runs."""
    assert isinstance(engine.compiled, GraphedSteps)
    used: list[int] = []

    def counting(size: int, replay: Compute) -> Compute:
        def count() -> torch.Tensor:
            used.append(size)
            return replay()

        return count

    for size, graph in engine.compiled._live.items():
        graph._replay = counting(size, graph._replay)
    return used


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_a_model_with_routers_is_right_whether_it_can_be_captured_or_not(name: str, tmp_path: Path) -> None:
    engine = _captured(_engine(name, tmp_path))
    assert _serve(engine, _prompts()) == [_generate(name, prompt) for prompt in _prompts()]


@pytest.mark.parametrize("limits", [{"is_static_cache": True}, {"num_pages": 10}, {"max_batch_tokens": 9}])
def test_a_static_cache_preemption_and_chunks_change_nothing(limits: dict[str, Any], tmp_path: Path) -> None:
    prompts = [zoo.prompt(12 + 5 * n, seed=n) for n in range(6)]
    expected = [_generate("llama", prompt, 120) for prompt in prompts]
    num_pages = limits.pop("num_pages", None)
    if num_pages is not None:
        per_token = _engine("llama", tmp_path).lane.kv_bytes_per_token
        limits["kv_budget_bytes"] = (num_pages + NUM_TRIAL_BLOCKS) * BLOCK_SIZE * per_token
    engine = _captured(_engine("llama", tmp_path, **limits))
    runner = engine.runner
    assert isinstance(runner, PagedRunner)
    addresses = [tensor.data_ptr() for tensor in (*runner.storage.keys, *runner.storage.values)]
    for _ in range(2):
        assert _serve(engine, prompts, 120) == expected
        engine.on_idle()
    assert [tensor.data_ptr() for tensor in (*runner.storage.keys, *runner.storage.values)] == addresses
    assert (engine.stats().preemptions_total > 0) == (num_pages is not None)
    assert engine.stats().graph_batch_sizes == SIZES


def test_what_else_is_allocated_and_freed_does_not_reach_into_a_graph(tmp_path: Path) -> None:
    expected = [_generate("llama", prompt) for prompt in _prompts()]
    engine = _captured(_engine("llama", tmp_path))
    assert _serve(engine, _prompts()[:2]) == expected[:2]
    torch.cuda.empty_cache()
    rubbish = [torch.full((2**18,), torch.nan, device="cuda") for _ in range(64)]  # wherever memory is free
    assert _serve(engine, _prompts()) == expected  # with longer prompts than any before
    del rubbish
    torch.cuda.empty_cache()
    assert _serve(engine, _prompts()) == expected


def test_a_replay_allocates_nothing_and_copies_tokens_that_only_the_device_knows(tmp_path: Path) -> None:
    engine = _captured(_engine("llama", tmp_path))
    graphs = engine.compiled
    assert isinstance(graphs, GraphedSteps)
    with torch.inference_mode(), graphs._scene.trial(3) as layout:
        first = graphs.run(layout)
        assert first is not None and first.shape == (3, engine.sampler.vocab_size)
        first = first.clone()
        before = torch.cuda.memory_allocated()
        again = graphs.run(layout)
        assert torch.cuda.memory_allocated() == before
        assert again is not None and torch.equal(again, first)  # bit for bit
        ids = torch.tensor(layout.input_ids, device="cuda")
        other = graphs.run(layout, ids.flip(0))
        assert other is not None and not torch.equal(other, first)
        back = graphs.run(layout, ids)
        assert back is not None and torch.equal(back, first)


def test_a_step_that_waits_for_the_device_stays_eager_and_others_can_be_captured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = _engine("llama", tmp_path)
    stream = torch.cuda.current_stream()
    model = engine.runner.program.model  # type: ignore[attr-defined]
    handle = model.register_forward_pre_hook(lambda *_: bool(torch.ones(1, device="cuda").any()) and None)
    expected = _generate("llama", zoo.prompt(9))
    assert _serve(engine, [zoo.prompt(9)]) == [expected]
    handle.remove()
    assert engine.stats().graph_batch_sizes == ()
    assert "steps of 8 sequences are not captured around the eager step" in caplog.text
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    torch.rand(4, device="cuda")  # the generator is not left within a capture
    after = _captured(_engine("llama", tmp_path))
    assert _serve(after, [zoo.prompt(9)]) == [expected]
    assert after.stats().graph_batch_sizes == SIZES


def test_captures_share_one_pool() -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    weight = torch.randn(512, 512, device="cuda")
    inputs = [torch.randn(rows, 512, device="cuda") for rows in (8192, 8192, 8192)]
    replays = [recorder.record(lambda x=x: (x @ weight).relu() @ weight) for x in inputs]  # type: ignore[misc]
    taken = recorder.num_bytes
    for x, replay in zip(inputs, replays, strict=True):
        x.normal_()
        torch.testing.assert_close(replay(), (x @ weight).relu() @ weight)
    # Three results of 16 MiB, and twice that on the way there once: 80, not 144.
    assert taken < 112 * 2**20


def test_bfloat16_is_captured_too(tmp_path: Path) -> None:
    engine = _captured(_engine("llama", tmp_path, torch.bfloat16))
    assert engine.stats().graph_batch_sizes == SIZES
    assert [len(ids) for ids in _serve(engine, _prompts())] == [NUM_TOKENS] * len(LENGTHS)


def _why_not_compiled() -> str | None:
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        return "compiled code for CUDA is built with the toolkit's headers, and there is no CUDA_HOME"
    return None if shutil.which("g++") else "no g++"


@pytest.mark.skipif(_why_not_compiled() is not None, reason=str(_why_not_compiled()))
@pytest.mark.parametrize("has_graphs", [False, True])
def test_compiled_code_serves_and_is_captured(
    has_graphs: bool, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cache = tmp_path_factory.getbasetemp() / "compiled"  # the second run finds what the first has compiled
    how = CompileConfig(cache, has_graphs=has_graphs, sizes=(2, 8))
    engine = _engine("llama", cache, compile=how)
    assert engine.compiled is not None
    end = time.monotonic() + 400
    while engine.compiled.num_decided < 2 or engine.has_work():
        assert time.monotonic() < end, "nothing is decided"
        if engine.has_work():
            engine.step()
        else:
            time.sleep(0.02)
    # Which is the faster is the device's to say; that each was compiled and found right is what counts here.
    assert "differ" not in caplog.text and "Error" not in caplog.text
    assert engine.stats().graph_batch_sizes == ((2, 8) if has_graphs else ())
    expected = [_generate("llama", prompt) for prompt in _prompts()]
    assert _serve(engine, _prompts()) == expected
    engine.close()
