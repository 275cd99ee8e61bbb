"""The bounds of the GPU benchmark are right by hand, and its measurements run, on a small model without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_steps
from benchmarks.gpu_bounds import Ceilings, Costs
from benchmarks.gpu_models import GPU_SHAPES, Weights, make_model
from benchmarks.gpu_steps import Card, Way
from benchmarks.models import Shape
from engine.model.int4.linear import Int4Linear
from engine.model.paged_attention import attend_blocks
from tests.engine.graphs.twin import Stopwatch, TwinRecorder

CEILINGS = Ceilings(bytes_per_s=1e12, flops_per_s=1e14)
SMALL = Shape(
    "llama",
    512,
    {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 4096,
    },
)
INT4 = Shape("llama", 512, {**SMALL.values, "hidden_size": 128, "intermediate_size": 256})


def test_the_weights_counted_are_those_of_the_models() -> None:
    llama = Costs.of(GPU_SHAPES["llama-2-7b"])
    assert llama.layer_weights + 2 * llama.head_weights == pytest.approx(6.738e9, rel=1e-3)
    assert llama.kv_bytes(1) == 512 * 1024
    qwen = Costs.of(GPU_SHAPES["qwen-0.5b"])
    assert qwen.layer_weights + qwen.head_weights == pytest.approx(0.494e9, rel=1e-3)  # tied
    assert qwen.kv_bytes(1) == 24 * 2 * 2 * 64 * 2


def test_weights_counted_are_those_of_a_model_that_is_made() -> None:
    loaded = make_model(SMALL, torch.device("cpu"))
    matrices = {name: weight.numel() for name, weight in loaded.model.named_parameters() if weight.dim() == 2}
    embedding = matrices.pop("model.embed_tokens.weight")
    costs = Costs.of(SMALL)
    assert costs.layer_weights + costs.head_weights == sum(matrices.values())
    assert costs.head_weights == embedding


def test_one_row_is_bound_by_memory_and_a_prompt_by_arithmetic() -> None:
    costs = Costs(layer_weights=1000, head_weights=100, kv_per_token=10, attended_per_pair=20)
    one = costs.decode(1, 50, CEILINGS)
    assert one.by == "memory"
    assert one.seconds == pytest.approx((1100 + 10 * 50) * 2 / 1e12)
    many = costs.decode(1000, 0, CEILINGS)
    assert many.by == "arithmetic"
    assert many.seconds == pytest.approx(2 * 1000 * 1100 / 1e14)
    int4 = Costs(1000, 100, 10, 20, layer_itemsize=0.5 + 4 / 64)
    assert int4.decode(1, 50, CEILINGS).seconds == pytest.approx((562.5 + 200 + 1000) / 1e12)
    prompt = costs.prefill(2000, CEILINGS)
    flops = 2 * (1000 * 2000 + 100 + 20 * 2000 * 2001 / 2)
    assert prompt.by == "arithmetic"
    assert prompt.seconds == pytest.approx(flops / 1e14)


CARD = Card(torch.device("cpu"), wait=lambda: None)


def _plan(directory: Path, *options: str) -> gpu.Plan:
    sizes = ("--batches", "1", "3", "--contexts", "40", "90", "--prefill", "70", "--steps", "2")
    return gpu.make_plan(gpu.parse([*sizes, "--cache", str(directory), *options]))


@pytest.fixture
def _paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, by the kernel's twin, and captures by theirs."""
    monkeypatch.setattr("engine.build.kernel_for", lambda _device: attend_blocks)
    monkeypatch.setattr("engine.build.recorder_for", lambda _device: TwinRecorder())
    monkeypatch.setattr("engine.graphs.steps.time_compute", Stopwatch())


def _measured(
    plan: gpu.Plan, free_bytes: int = 64 << 30, weights: Weights = "bf16"
) -> dict[tuple[gpu.Cell, Way], float | str]:
    loaded = make_model(SMALL, CARD.device, weights, plan.cache)
    return {(cell, way): result for cell, way, result in gpu.measure(loaded, Costs.of(SMALL), CARD, plan, free_bytes)}


@pytest.mark.usefixtures("_paged")
def test_every_cell_is_timed_in_every_way_that_is_served(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "--ways", "eager", "graphs")
    results = _measured(plan)
    assert [(cell.name, way) for cell, way in results] == [
        (name, way)
        for way in ("eager", "graphs")
        for name in ("decode 1 x 40", "decode 3 x 40", "decode 1 x 90", "decode 3 x 90", "prefill 70")
    ]
    assert [result for result in results.values() if not isinstance(result, float)] == []


def test_a_way_that_refuses_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    results = _measured(_plan(tmp_path, "--ways", "graphs", "eager"))  # slots: nothing is captured
    for (cell, way), result in results.items():
        if way == "graphs" and not cell.is_prefill:
            assert result == f"steps of {cell.batch} sequences are not captured"
        else:
            assert isinstance(result, float)


@pytest.mark.usefixtures("_paged")
def test_what_does_not_fit_says_so_and_is_not_tried(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "--ways", "eager")
    costs = Costs.of(SMALL)
    largest = gpu.Cell(3, 90)
    results = _measured(plan, free_bytes=gpu.SPARE_BYTES + plan.kv_bytes(largest, costs) - 1)
    assert [cell for cell, way in results if isinstance(results[cell, way], str)] == [largest]
    assert "does not fit" in str(results[largest, "eager"])


@pytest.mark.usefixtures("_paged")
def test_a_cell_that_runs_out_of_memory_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_at = gpu_steps._start_at
    is_first = iter((False, True))  # the second cell's first sequence

    def exhausted(*arguments: Any) -> None:
        if next(is_first, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        start_at(*arguments)

    monkeypatch.setattr(gpu_steps, "_start_at", exhausted)
    results = list(_measured(_plan(tmp_path, "--ways", "eager")).values())
    assert results[1] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert all(isinstance(result, float) for result in (results[0], *results[2:]))


@pytest.mark.usefixtures("_paged")
def test_int4_weights_are_those_of_all_layers_and_are_timed_too(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "--ways", "eager", "--contexts", "40")
    plain, loaded = (make_model(INT4, CARD.device, weights, tmp_path) for weights in ("bf16", "int4"))
    costs = Costs.of(INT4, int4_group_size=64)
    matrices = sum(m.num_bytes for m in loaded.model.modules() if isinstance(m, Int4Linear))
    assert matrices == costs.layer_weights * costs.layer_itemsize
    assert loaded.num_parameters == plain.num_parameters
    results = gpu.measure(loaded, costs, CARD, plan, 64 << 30)
    assert all(isinstance(result, float) for _, _, result in results)


def test_a_row_has_every_way_and_its_best_beside_the_bound(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    costs = Costs.of(SMALL)
    first, second = plan.cells[:2]
    bound_s = gpu.bound_of(first, plan, costs, CEILINGS).seconds
    times: dict[tuple[gpu.Cell, Way], float] = {(first, "eager"): 4 * bound_s, (first, "graphs"): 2 * bound_s}
    lines = gpu.rows("small", "bf16", plan, costs, CEILINGS, times)
    assert len(lines) == len(plan.cells) and all(len(line) == len(gpu.HEADER) for line in lines)
    assert lines[0][:5] == ("small", "bf16", "decode", "1", "40")
    assert lines[0][5:9] == (
        f"{4e3 * bound_s:.2f}", f"{2e3 * bound_s:.2f}", "-", f"{1 / (2 * bound_s):.0f}"
    )  # fmt: skip
    assert lines[0][-1] == "50%"
    assert lines[1][3:] == (str(second.batch), "40", "-", "-", "-", "-", lines[1][9], lines[1][10], "-")


def test_a_whole_run_writes_each_figure_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(GPU_SHAPES, "small", SMALL)
    ceilings = gpu.measure_ceilings(CARD, num_copied_bytes=1 << 16, size=32)
    assert ceilings.bytes_per_s > 0 and ceilings.flops_per_s > 0
    plan = _plan(tmp_path, "--ways", "eager", "--batches", "1", "--contexts", "40")
    lines = gpu.run_model("small", "bf16", CARD, ceilings, plan)
    written = capsys.readouterr().out
    assert "small bf16 decode 1 x 40 eager: " in written and "small bf16 prefill 70 eager: " in written
    assert [line[2:5] for line in lines] == [("decode", "1", "40"), ("prefill", "1", "70")]
    assert all(line[6:8] == ("-", "-") and line[-1].endswith("%") for line in lines)


def test_quick_leaves_out_what_takes_long() -> None:
    quick, whole = (gpu.make_plan(gpu.parse(argv)) for argv in (["--quick"], []))
    assert [cell.name for cell in quick.cells] == ["decode 1 x 128", "decode 64 x 128", "prefill 2048"]
    assert quick.ways == ("eager", "graphs") and whole.ways == gpu.WAYS
    assert len(whole.cells) == 9 and quick.num_steps < whole.num_steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_refuses_and_says_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu"])
    with pytest.raises(SystemExit, match=r"torch sees no CUDA device here; benchmarks\.offline"):
        gpu.main()


def test_a_shape_it_does_not_know_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", "gpt-5"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "unknown shape 'gpt-5'; there are llama-2-7b, qwen-0.5b" in capsys.readouterr().err
