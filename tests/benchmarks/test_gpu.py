"""The bounds of the GPU benchmark are right by hand, and its measurements run, on a small model without a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_bounds import Ceilings, Costs
from benchmarks.models import Shape
from engine.model.paged_attention import attend_blocks

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


def test_the_weights_counted_are_those_of_the_models() -> None:
    llama = Costs.of(gpu.GPU_SHAPES["llama-2-7b"])
    assert llama.layer_weights + 2 * llama.head_weights == pytest.approx(6.738e9, rel=1e-3)
    assert llama.kv_bytes(1) == 512 * 1024
    qwen = Costs.of(gpu.GPU_SHAPES["qwen-0.5b"])
    assert qwen.layer_weights + qwen.head_weights == pytest.approx(0.494e9, rel=1e-3)  # tied
    assert qwen.kv_bytes(1) == 24 * 2 * 2 * 64 * 2


def test_weights_counted_are_those_of_a_model_that_is_made() -> None:
    loaded = gpu.make_model(SMALL, torch.device("cpu"))
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
    prompt = costs.prefill(2000, CEILINGS)
    flops = 2 * (1000 * 2000 + 100 + 20 * 2000 * 2001 / 2)
    assert prompt.by == "arithmetic"
    assert prompt.seconds == pytest.approx(flops / 1e14)


@pytest.mark.parametrize("is_paged", [False, True])
def test_every_measurement_gives_a_line_and_what_does_not_fit_says_so(
    is_paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_paged:  # as on a GPU, by the kernel's twin
        monkeypatch.setattr("engine.build.kernel_for", lambda _device: attend_blocks)
    monkeypatch.setattr(gpu, "BATCHES", (1, 3))
    monkeypatch.setattr(gpu, "CONTEXTS", (40, 90))
    monkeypatch.setattr(gpu, "PREFILL_TOKENS", 70)
    card = gpu.Card(torch.device("cpu"), wait=lambda: None)
    ceilings = gpu.measure_ceilings(card, num_copied_bytes=1 << 16, size=32)
    assert ceilings.bytes_per_s > 0 and ceilings.flops_per_s > 0
    costs = Costs.of(SMALL)
    free_bytes = gpu.SPARE_BYTES + costs.kv_bytes(3 * gpu.num_positions(90, 2)) - 1
    loaded = gpu.make_model(SMALL, card.device)
    lines = list(gpu.rows("small", loaded, costs, card, ceilings, num_steps=2, free_bytes=free_bytes))
    assert [line[1:4] for line in lines] == [
        ("decode", "1", "40"),
        ("decode", "3", "40"),
        ("decode", "1", "90"),
        ("decode", "3", "90"),
        ("prefill", "1", "70"),
    ]
    assert all(len(line) == len(gpu.HEADER) for line in lines)
    assert "does not fit" in lines[3][4]
    for line in (*lines[:3], lines[4]):
        assert float(line[4]) > 0 and line[7] in ("memory", "arithmetic") and line[8].endswith("%")


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
