"""From settings to a stack, with a real tiny checkpoint; and every reason not to start, in one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from config import Settings, StartupError
from engine.sequence import SamplingParams, Sequence
from runtime import model_loading
from runtime.engine_limits import MAX_BATCH_TOKENS_CPU
from runtime.hardware import free_memory_bytes
from runtime.model_loading import load_model_stack
from tests import zoo_seq2seq
from tests.api.scripted import byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.zoo import generate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


def ignore(doing: str, share: float | None) -> None:
    pass


def settings_of(checkpoint: Path | str, **options: Any) -> Settings:
    return Settings(**{"hf_model": str(checkpoint), "accelerator_type": "cpu", "torch_dtype": "float32", **options})


def test_a_checkpoint_becomes_an_engine_that_generates_what_the_model_does(checkpoint: Path) -> None:
    news: list[str] = []
    stack = load_model_stack(settings_of(checkpoint), lambda doing, share: news.append(doing))
    prompt = stack.prompts.encode_text("hello")
    stack.engine.add(Sequence(0, prompt, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), 0.0))
    tokens: list[int] = []
    while stack.engine.has_work():
        tokens += [token for output in stack.engine.step() for token in output.token_ids]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    assert tokens == generate(model, prompt, 12)
    info = stack.info
    assert info.name == str(checkpoint)
    assert (info.architecture, info.dtype, info.device, info.lane) == ("LlamaForCausalLM", "float32", "cpu", "flat")
    assert (info.max_model_len, info.kv_layout) == (512, "slots")
    assert info.eos_token_ids == {stack.tokenizer.eos_token_id}
    assert info.num_parameters == sum(p.numel() for p in model.parameters())
    # Keys and values of two layers with two heads of 16 numbers, four bytes each.
    assert info.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert 0 < info.kv_budget_bytes < free_memory_bytes() * 1.5
    assert any("tokenizer" in line for line in news) and any("weights" in line for line in news)


def test_limits_reach_the_engine(checkpoint: Path) -> None:
    options: dict[str, Any] = {
        "max_model_len": 100,
        "kv_cache_memory": 2**20,
        "max_batch_tokens": 64,
        "continuous_batching_batch_size": 5,
        "prefix_caching": False,
    }
    stack = load_model_stack(settings_of(checkpoint, **options), ignore)
    config = stack.engine.config  # type: ignore[attr-defined]
    assert (config.max_model_len, config.kv_budget_bytes, config.max_batch_tokens) == (100, 2**20, 64)
    assert (config.max_num_seqs, config.is_prefix_caching) == (5, False)
    assert stack.info.max_model_len == 100 and stack.info.kv_budget_bytes == 2**20


def test_a_step_has_room_for_every_sequence_by_default(checkpoint: Path) -> None:
    large = MAX_BATCH_TOKENS_CPU + 1
    stack = load_model_stack(settings_of(checkpoint, continuous_batching_batch_size=large), ignore)
    assert stack.engine.config.max_batch_tokens == large  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda_is_a_warning_by_default_and_an_error_when_asked_for(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    defaults = Settings(hf_model=str(checkpoint), torch_dtype="float32")
    with caplog.at_level(logging.WARNING):
        assert load_model_stack(defaults, ignore).info.device == "cpu"
    assert "running on the CPU" in caplog.text
    with pytest.raises(StartupError, match="--accelerator-type cuda"):
        load_model_stack(settings_of(checkpoint, accelerator_type="cuda"), ignore)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"torch_dtype": "float16"}, "--torch-dtype float16: should be bfloat16 or float32"),
        ({"max_model_len": 513}, r"--max-model-len 513: should be at most the model's positions \(512\)"),
        ({"kv_cache_memory": 2**60}, f"--kv-cache-memory {2**60}: should be at most"),
        ({"kv_cache_memory": 1}, "--kv-cache-memory 1: "),
        ({"revision": "v2"}, "--revision v2: .* is a local directory"),
        ({"model_type": "NoSuchClass"}, "--model-type NoSuchClass"),
        ({"model_type": "no.such.Class"}, "--model-type no.such.Class"),
        ({"tokenizer_type": "NoSuchTokenizer"}, "--tokenizer-type NoSuchTokenizer"),
        ({"architecture_type": "encoder-decoder"}, "--architecture-type encoder-decoder: .*llama.* should be decoder"),
        ({"serving_type": "whisper"}, "--serving-type whisper: .*llama.* should be chat"),
        ({"processor_type": "AutoFeatureExtractor"}, "--processor-type AutoFeatureExtractor: has no effect"),
        (
            {"static_cache": True, "static_cache_encoder_max_length": 9},
            "--static-cache-encoder-max-length 9: llama has no encoder",
        ),
        ({"hf_model": "/no/such/directory"}, "/no/such/directory"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], words: str, checkpoint: Path) -> None:
    with pytest.raises(StartupError, match=words) as refused:
        load_model_stack(settings_of(checkpoint, **options), ignore)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        (
            "t5",
            {"architecture_type": "decoder"},
            "--architecture-type decoder: .* is a t5, so it should be encoder-dec",
        ),
        ("t5", {"serving_type": "whisper"}, "--serving-type whisper: .* is a t5, so it should be chat"),
        ("t5", {"torch_dtype": "float16", "accelerator_type": "cuda"}, "float16|finds no such device"),
        ("whisper", {"serving_type": "chat"}, "--serving-type chat: .* is a whisper, so it should be whisper"),
        ("speech_to_text", {}, "speech_to_text reads speech, and only Whisper is served"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused_before_its_weights_are_loaded(
    model_type: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)  # no weights at all
    with pytest.raises(StartupError, match=words):
        load_model_stack(settings_of(tmp_path, **options), ignore)


def save_seq2seq(name: str, directory: Path) -> Path:
    model = zoo_seq2seq.make(name)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_an_encoder_decoder_is_found_from_its_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        stack = load_model_stack(settings_of(save_seq2seq("bart", tmp_path)), ignore)
    assert "architecture type: encoder-decoder (the checkpoint is a bart)" in caplog.text
    info = stack.info
    assert (info.family, info.lane, info.max_model_len) == ("encoder-decoder", "seq2seq", zoo_seq2seq.MAX_POSITIONS)
    assert info.max_source_len == zoo_seq2seq.MAX_POSITIONS
    assert info.decoder_prompt_ids == (zoo_seq2seq.START_ID,)
    asked = settings_of(
        tmp_path,
        architecture_type="encoder-decoder",
        static_cache=True,
        static_cache_decoder_max_length=9,
        static_cache_encoder_max_length=17,
    )
    info = load_model_stack(asked, ignore).info
    assert (info.max_model_len, info.max_source_len) == (9, 17)
    too_long = settings_of(tmp_path, static_cache=True, static_cache_encoder_max_length=999)
    with pytest.raises(StartupError, match=r"--static-cache-encoder-max-length 999: should be at most .* \(128\)"):
        load_model_stack(too_long, ignore)


def test_a_float16_checkpoint_is_refused_by_auto_on_the_cpu(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", dtype="float16").save_pretrained(tmp_path)
    with pytest.raises(StartupError, match="--torch-dtype auto: the checkpoint is float16"):
        load_model_stack(settings_of(tmp_path, torch_dtype="auto"), ignore)


def test_auto_follows_the_checkpoint(checkpoint: Path) -> None:
    assert load_model_stack(settings_of(checkpoint, torch_dtype="auto"), ignore).info.dtype == "float32"


def test_pickled_weights_are_never_read(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(StartupError, match="safetensors"):
        load_model_stack(settings_of(tmp_path), ignore)


def test_what_the_checkpoint_recommends_is_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=128)
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true, "eos_token_id": [3, 5]}')
    info = load_model_stack(settings_of(tmp_path), ignore).info
    assert info.generation_defaults == {"temperature": 0.6, "top_k": 20}
    assert info.eos_token_ids == {3, 5}


def test_demo_is_the_model_beside_main(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_loading.DEMO_MODELS, "demo", checkpoint)
    assert load_model_stack(settings_of("demo"), ignore).info.name == "demo"
    monkeypatch.setitem(model_loading.DEMO_MODELS, "demo", checkpoint / "missing")
    with pytest.raises(StartupError, match=r"--hf-model demo: .* is missing"):
        load_model_stack(settings_of("demo"), ignore)
    with pytest.raises(StartupError, match="--revision v1"):
        load_model_stack(settings_of("demo", revision="v1"), ignore)
