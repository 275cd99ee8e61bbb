"""A checkpoint loaded with int4 weights: every family, close to what it was, from the disk the second time."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from engine.build import build_engine
from engine.config import EngineConfig
from engine.model import quantize
from engine.model.drift import measure_drift, trial_logits
from engine.model.int4.cpu import CpuInt4
from engine.model.int4.disk import KeptWeights
from engine.model.int4.linear import Int4Linear
from engine.model.int4.report import QuantiseReport, describe_weights
from engine.model.loader import LoadedModel, LoadError, LoadRequest, load_model
from engine.model.quantize import Quantisation, QuantiseRequest
from tests.engine.harness import drive, greedy, tokens
from tests.int4_weights import HAS_CPU_KERNEL
from tests.zoo import generate, prompt, randomise

pytestmark = pytest.mark.skipif(not HAS_CPU_KERNEL, reason="this build of torch has no int4 kernel for CPUs")

IDS = prompt(40)
HIDDEN = 128


@pytest.fixture(autouse=True)
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that every CPU has: our own is compared with it elsewhere."""
    monkeypatch.setattr(quantize, "find_kernel", lambda *_: CpuInt4)


def make(family: str) -> Any:
    """A tiny random model of a family, wide enough for groups of 64."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: Any
    if family == "llama":
        config = LlamaConfig(**sizes, intermediate_size=256, num_key_value_heads=2, attention_bias=True, **ids)
        model = LlamaForCausalLM(config)
    elif family == "moe":
        config = Qwen3MoeConfig(
            **sizes, intermediate_size=256, num_key_value_heads=2, num_experts=16, num_experts_per_tok=2,
            moe_intermediate_size=64, **ids,
        )  # fmt: skip
        model = Qwen3MoeForCausalLM(config)
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=HIDDEN, n_layer=2, n_head=4, **ids))
    elif family == "t5":
        config = T5Config(
            vocab_size=256, d_model=HIDDEN, d_kv=32, d_ff=256, num_layers=2, num_heads=4, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    else:
        config = WhisperConfig(
            vocab_size=256, d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=16,
            max_source_positions=50, max_target_positions=64, decoder_start_token_id=1, suppress_tokens=None,
            begin_suppress_tokens=None, **ids,
        )  # fmt: skip
        model = WhisperForConditionalGeneration(config)
    # T5 does not scale its scores: attention that is too sharp would make a difference of every rounding.
    randomise(model, weight_std=0.04 if family == "t5" else 0.08)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def checkpoint(family: str, checkpoints: Path) -> Path:
    """The family's model on disk, in bfloat16."""
    directory = checkpoints / family
    if not directory.exists():
        make(family).to(torch.bfloat16).save_pretrained(directory)
    return directory


def class_of(family: str) -> str:
    return {"t5": "AutoModelForSeq2SeqLM", "whisper": "AutoModelForSpeechSeq2Seq"}.get(family, "AutoModelForCausalLM")


def load(path: Path, family: str, **options: Any) -> LoadedModel:
    progress = options.pop("progress", lambda _what, _share: None)
    quantise = QuantiseRequest(**options)
    return load_model(LoadRequest(str(path), model_type=class_of(family), quantise=quantise), progress)


def plain(directory: Path, family: str) -> Any:
    return getattr(transformers, class_of(family)).from_pretrained(directory, dtype=torch.bfloat16).eval()


def int4_layers(model: nn.Module) -> dict[str, Int4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}


FAMILIES = {"llama": 14, "moe": 8, "gpt2": 8, "t5": 32, "whisper": 32}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_close_to_what_it_was(family: str, checkpoints: Path) -> None:
    directory = checkpoint(family, checkpoints)
    loaded = load(directory, family)
    assert len(int4_layers(loaded.model)) == FAMILIES[family]
    reference = plain(directory, family)
    drift = measure_drift(trial_logits(reference, IDS), trial_logits(loaded.model, IDS))
    assert 0 < drift.mean_kl < 0.1
    assert loaded.num_parameters == sum(p.numel() for p in reference.parameters())
    assert loaded.num_bytes < sum(p.nbytes for p in reference.parameters())
    # Nothing of transformers' own quantisation is left, which other code would look for.
    assert not getattr(loaded.model, "is_quantized", False) and not hasattr(loaded.model.config, "quantization_config")
    assert not any(hasattr(m.config, "_is_quantized") for m in loaded.model.modules() if hasattr(m, "config"))


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_logits_are_those_of_the_dequantised_weights(family: str, checkpoints: Path) -> None:
    directory = checkpoint(family, checkpoints)
    loaded = load(directory, family)
    reference = plain(directory, family)
    for name, layer in int4_layers(loaded.model).items():
        assert layer._packed is not None, f"{name} was used by its weight"
        weight = layer._packed.dequantise()
        module = reference.get_submodule(name)
        module.weight = nn.Parameter(weight.t().contiguous() if layer._is_transposed else weight)
    expected, got = trial_logits(reference, IDS), trial_logits(loaded.model, IDS)
    assert float((got - expected).norm() / expected.norm()) < 0.03


def test_it_is_served_in_the_flat_lane_with_the_tokens_of_its_own_generate(checkpoints: Path) -> None:
    loaded = load(checkpoint("llama", checkpoints), "llama")
    loaded.model.generation_config.update(eos_token_id=None, do_sample=False)
    expected = [generate(loaded.model, prompt(length), 12) for length in (9, 5)]
    config = EngineConfig(max_num_seqs=4, max_batch_tokens=64, max_model_len=64)
    engine = build_engine(loaded, config, lambda _what, _share: None)
    assert engine.lane.name == "flat", engine.lane.reason
    # One after the other: in bfloat16 what shares a step may change nearly equal logits' places.
    for number, length in enumerate((9, 5)):
        outputs = drive(engine, [greedy(number, prompt(length), 12)])
        assert tokens(outputs[number])[:6] == expected[number][:6]


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_encoder_decoders_are_served_in_their_lane(family: str, checkpoints: Path) -> None:
    loaded = load(checkpoint(family, checkpoints), family)
    config = EngineConfig(max_num_seqs=4, max_batch_tokens=64, max_model_len=64, max_source_len=50)
    engine = build_engine(loaded, config, lambda _what, _share: None)
    assert engine.lane.name == "seq2seq", engine.lane.reason
    assert all(layer._packed is not None for layer in int4_layers(loaded.model).values()), "used by its weight"


def test_weights_come_from_the_disk_the_second_time_and_are_the_same(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("t5", checkpoints)
    news: list[str] = []
    progress = lambda what, share: news.append(what)  # noqa: E731
    first = trial_logits(load(directory, "t5", directory=tmp_path, progress=progress).model, IDS)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("t5-64-") and any("quantising" in line for line in news)
    news.clear()
    with monkeypatch.context() as patched:
        patched.setattr(quantize, "solve", lambda *_: pytest.fail("solved again"))
        second = trial_logits(load(directory, "t5", directory=tmp_path, progress=progress).model, IDS)
    assert torch.equal(first, second)
    assert any(f"are taken from {kept}" in line for line in news) and any("reading" in line for line in news)
    # Another group size, or other weights, are another file.
    load(directory, "t5", directory=tmp_path, group_size=32)
    changed = shutil.copytree(directory, tmp_path / "t5")
    weights = load_file(changed / "model.safetensors")
    name = next(name for name in weights if name.endswith("SelfAttention.q.weight"))
    save_file({**weights, name: -weights[name]}, changed / "model.safetensors", metadata={"format": "pt"})
    third = trial_logits(load(changed, "t5", directory=tmp_path).model, IDS)
    assert not torch.equal(first, third)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_damaged_file_is_made_anew_with_a_line_in_the_log(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = checkpoint("llama", checkpoints)
    first = trial_logits(load(directory, "llama", directory=tmp_path).model, IDS)
    (kept,) = tmp_path.iterdir()
    content = kept.read_bytes()
    kept.write_bytes(content[: len(content) // 2])
    assert torch.equal(trial_logits(load(directory, "llama", directory=tmp_path).model, IDS), first)
    assert "made anew" in caplog.text
    assert kept.read_bytes() == content


def test_a_file_that_breaks_while_it_is_read_ends_the_load_with_the_reason(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("llama", checkpoints)
    load(directory, "llama", directory=tmp_path)

    def broken(_kept: KeptWeights, _name: str) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(KeptWeights, "read", broken)
    with pytest.raises(LoadError, match="cannot be quantised: the disk is gone"):
        load(directory, "llama", directory=tmp_path)


def test_a_layer_with_values_that_are_not_finite_stays_and_nothing_is_kept(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = shutil.copytree(checkpoint("llama", checkpoints), tmp_path / "broken")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO):
        loaded = load(directory, "llama", directory=tmp_path / "kept")
    assert len(int4_layers(loaded.model)) == 13
    assert "1 because the weight holds values that are not finite" in caplog.text
    assert not list((tmp_path / "kept").glob("*"))


def test_the_report_counts_layers_bytes_and_reasons(
    checkpoints: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[QuantiseReport] = []
    count = describe_weights

    def noted(*arguments: Any) -> QuantiseReport:
        reports.append(count(*arguments))
        return reports[-1]

    monkeypatch.setattr(quantize, "describe_weights", noted)
    with caplog.at_level(logging.INFO):
        load(checkpoint("moe", checkpoints), "moe")
    (report,) = reports
    reference = plain(checkpoint("moe", checkpoints), "moe")
    assert report.bytes_before == sum(p.nbytes for p in reference.parameters())
    # q, k, v and o of two layers, at half a byte a weight and four bytes a group of 64.
    num_weights = 2 * HIDDEN * (HIDDEN + HIDDEN // 2 + HIDDEN // 2 + HIDDEN)
    assert report.num_layers == 8
    assert report.bytes_before - report.bytes_after == 2 * num_weights - (num_weights // 2 + num_weights // 16)
    assert report.left_alone["the output head"] == report.left_alone["embeddings"] == (1, 2 * 256 * HIDDEN)
    assert report.left_alone["weights of experts, which are one tensor"][0] == 4
    assert str(report) in caplog.text and "8 linear layers have int4 weights" in caplog.text


def test_the_drift_is_in_the_log_where_it_was_asked_for(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(checkpoint("llama", checkpoints), "llama", report_token_ids=tuple(IDS))
    assert "over 40 tokens: mean KL" in caplog.text


def test_a_model_of_which_nothing_can_be_quantised_is_refused(checkpoints: Path) -> None:
    with pytest.raises(LoadError, match=r"no linear layer of .* can have int4 weights: .*not divisible by 256"):
        load(narrow(checkpoints), "llama", group_size=256)


def narrow(checkpoints: Path) -> Path:
    """A model whose every input is narrower than the largest groups."""
    directory = checkpoints / "narrow"
    if not directory.exists():
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def test_a_class_that_loads_weights_its_own_way_is_refused(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoint("llama", checkpoints)
    model = plain(directory, "llama")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_args, **_options: model)
    with pytest.raises(LoadError, match="does not let its weights be quantised"):
        load(directory, "llama")


def test_a_device_without_a_kernel_is_refused(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_arguments: object) -> Any:
        raise RuntimeError("torch has no int4 kernel for abacus")

    monkeypatch.setattr(quantize, "find_kernel", none)
    with pytest.raises(LoadError, match=r"--hqq True: .*no int4 kernel for abacus"):
        load(checkpoint("llama", checkpoints), "llama")


def test_one_module_in_two_places_is_replaced_in_both() -> None:
    shared = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    quantisation = Quantisation("x", QuantiseRequest(), torch.device("cpu"), lambda _what, _share: None)
    quantisation.begin(model, None)
    assert quantisation.take(model, "a.0.weight", shared.weight.detach())
    assert isinstance(model["a"][0], Int4Linear) and model["b"][0] is model["a"][0]  # type: ignore[index]
    assert not quantisation.take(model, "a.0.bias", torch.zeros(64))
