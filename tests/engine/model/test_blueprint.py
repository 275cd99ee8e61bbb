"""What a drawing says of weights, against the same model loaded from disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig

from engine.model.blueprint import count_weights, draw, int4_bytes, measure_widths, resolve_dtype
from engine.model.int4.linear import Int4Linear
from engine.model.loader import LoadError, LoadRequest, load_model
from engine.model.quantize import QuantiseRequest
from tests.engine.model.drawings import class_of, drawn, real
from tests.zoo import VOCAB_SIZE

SAVED = ("llama", "qwen3", "gemma2", "deepseek_v3", "mixtral", "gpt2", "mamba", "t5", "whisper")


@pytest.mark.parametrize("name", SAVED)
def test_planned_bytes_are_those_of_the_loaded_parameters(name: str, tmp_path: Path) -> None:
    is_tied = name in ("llama", "gemma2", "gpt2")  # counted once
    changes: dict[str, Any] = {"tie_word_embeddings": True} if is_tied else {}
    real(name, **changes).save_pretrained(tmp_path)
    for dtype_name in ("float32", "bfloat16", "float16", "auto"):
        request = LoadRequest(str(tmp_path), model_type=class_of(name), dtype=dtype_name)
        config = AutoConfig.from_pretrained(tmp_path)
        dtype = resolve_dtype(dtype_name, config, None)
        weights = count_weights(draw(request, config, dtype), dtype, "cpu")
        loaded = load_model(request, lambda _doing, _share: None)
        assert (dtype, weights.parameters) == (loaded.dtype, loaded.num_bytes)
        assert weights.num_parameters == loaded.num_parameters
    # Where transformers keeps parts in float32 whatever is asked, that is counted too.
    assert len(count_weights(drawn("t5", torch.float16), torch.float16, "cpu").by_dtype) == 2


def test_a_huge_model_is_drawn_in_seconds_and_takes_no_memory() -> None:
    config = AutoConfig.for_model("deepseek_v3")  # its defaults are those of the real one
    before = psutil.Process().memory_info().rss
    started = time.monotonic()
    model = draw(LoadRequest("huge"), config, torch.bfloat16)
    weights = count_weights(model, torch.bfloat16, "cuda")
    assert time.monotonic() - started < 30
    assert psutil.Process().memory_info().rss - before < 500_000_000
    assert weights.num_parameters == 671_026_404_352
    assert weights.parameters == 2 * weights.num_parameters


def test_the_packed_copy_of_a_shared_head_is_bounded_and_of_a_packed_dtype_on_cpu_alone() -> None:
    model = drawn("llama", torch.bfloat16, tie_word_embeddings=True)
    head = VOCAB_SIZE * 64 * 2
    on_cpu = count_weights(model, torch.bfloat16, "cpu")
    assert on_cpu.packed_head == head and on_cpu.total == on_cpu.parameters + on_cpu.buffers + head
    assert count_weights(model, torch.bfloat16, "cuda").packed_head == 0
    assert count_weights(drawn("llama", tie_word_embeddings=True), torch.float32, "cpu").packed_head == 0
    assert count_weights(drawn("llama", torch.bfloat16), torch.bfloat16, "cpu").packed_head == 0
    both = drawn("t5", tie_word_embeddings=True)
    assert count_weights(both, torch.float32, "cpu").packed_head == VOCAB_SIZE * 64 * 4
    # More than a third of the model: not packed.
    large = drawn("llama", torch.bfloat16, tie_word_embeddings=True, vocab_size=10_000)
    assert count_weights(large, torch.bfloat16, "cpu").packed_head == 0


@pytest.mark.parametrize(("num_rows", "num_columns", "group_size"), [(32, 128, 64), (48, 256, 32), (16, 64, 64)])
def test_int4_bytes_are_those_of_the_tensors_that_torch_s_kernel_takes(
    num_rows: int, num_columns: int, group_size: int
) -> None:
    numbers = torch.zeros(num_rows, num_columns, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 8)
    scales_and_zeros = torch.zeros(num_columns // group_size, num_rows, 2, dtype=torch.bfloat16)
    torch.ops.aten._weight_int4pack_mm_for_cpu(
        torch.zeros(1, num_columns, dtype=torch.bfloat16), packed, group_size, scales_and_zeros
    )  # refuses tensors that do not fit each other
    assert int4_bytes(num_rows, num_columns, group_size) == packed.nbytes + scales_and_zeros.nbytes


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
def test_int4_weights_are_those_that_the_loader_makes(name: str, tmp_path: Path) -> None:
    real(name, torch.bfloat16).save_pretrained(tmp_path)
    request = LoadRequest(str(tmp_path), model_type=class_of(name), quantise=QuantiseRequest(group_size=32))
    model = draw(request, AutoConfig.from_pretrained(tmp_path), torch.bfloat16)
    plain = count_weights(model, torch.bfloat16, "cpu")
    int4 = count_weights(model, torch.bfloat16, "cpu", int4_group_size=32)
    loaded = load_model(request, lambda _doing, _share: None)
    layers = [module for module in loaded.model.modules() if isinstance(module, Int4Linear)]
    assert int4.num_quantised == len(layers) > 0
    assert int4.by_dtype["int4"] == sum(layer.num_bytes for layer in layers)
    assert int4.parameters == loaded.num_bytes < plain.parameters
    assert int4.num_parameters == plain.num_parameters == loaded.num_parameters
    assert int4.scratch == max(2 * layer.num_weights for layer in layers)
    assert plain.scratch == 0


def test_rows_and_columns_of_a_conv1d_are_the_other_way_round() -> None:
    int4 = count_weights(drawn("gpt2", torch.bfloat16), torch.bfloat16, "cpu", int4_group_size=64)
    # Attention's two and the first of the MLP have 64 inputs, its second 256: all divide.
    assert int4.num_quantised == 2 * 4
    numbers = 2 * (64 * 192 + 64 * 64 + 64 * 256 + 256 * 64)
    assert int4.by_dtype["int4"] == numbers // 2 + numbers // 64 * 4


def test_widths_are_those_of_the_widest_layer_and_of_all_experts_of_a_token() -> None:
    dense = measure_widths(drawn("llama"), torch.float32)
    assert (dense.hidden, dense.widest, dense.num_heads, dense.vocab_size, dense.itemsize) == (64, 96, 4, VOCAB_SIZE, 4)
    experts = measure_widths(drawn("mixtral"), torch.float32)
    assert experts.widest == 2 * 2 * 96  # gate and up of two experts


def test_auto_follows_the_config_and_else_the_stored_weights() -> None:
    class Config:
        dtype: torch.dtype | str | None = None

    config = Config()
    assert resolve_dtype("float16", config, "bfloat16") is torch.float16
    assert resolve_dtype("auto", config, "bfloat16") is torch.bfloat16
    assert resolve_dtype("auto", config, None) is torch.float32
    config.dtype = "float16"
    assert resolve_dtype("auto", config, "bfloat16") is torch.float16


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [
        ("NoSuchModel", "no model class of that name"),
        ("AutoModelForSeq2SeqLM", "cannot be built: ValueError"),
        ("collections.OrderedDict", "cannot be built from a config alone"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(model_type: str, rule: str) -> None:
    config = AutoConfig.for_model("llama")
    with pytest.raises(LoadError, match=rule) as caught:
        draw(LoadRequest("tiny", model_type=model_type), config, torch.float32)
    assert "\n" not in str(caught.value)
