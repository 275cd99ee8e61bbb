"""--hqq True: a server with int4 weights answers, says what it did, and takes its weights from the disk next time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import openai
import pytest

from config import Settings, StartupError
from runtime.model_loading import load_model_stack
from tests import zoo_seq2seq
from tests.api.scripted import byte_tokenizer
from tests.e2e.serving_tiny import serve, serve_tiny
from tests.int4_weights import HAS_CPU_KERNEL

pytestmark = pytest.mark.skipif(not HAS_CPU_KERNEL, reason="this build of torch has no int4 kernel for CPUs")

OPTIONS: dict[str, Any] = {"hqq": True, "hqq_group_size": 32, "torch_dtype": "bfloat16", "accelerator_type": "cpu"}


def answer(base_url: str) -> tuple[str, str]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        chat = client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": "hello"}], max_tokens=12, temperature=0
        )
        streamed = client.completions.create(model="model", prompt="abc", max_tokens=12, temperature=0, stream=True)
        text = "".join(chunk.choices[0].text for chunk in streamed if chunk.choices)
        return chat.choices[0].message.content or "", text


def test_a_server_with_int4_weights_answers_alike_before_and_after_a_restart(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = []
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with serve_tiny("qwen3", checkpoints, cache_dir=str(tmp_path), hqq_report=True, **OPTIONS) as server:
                assert (server.manager.info.lane, server.manager.info.dtype) == ("flat", "bfloat16")
                answers.append(answer(server.base_url))
    assert answers[0] == answers[1] and all(answers[0])
    assert caplog.text.count("linear layers have int4 weights") == caplog.text.count("drift of the logits") == 2
    assert "are taken from" in caplog.text
    assert len(list((tmp_path / "int4").glob("*.safetensors"))) == 1


def test_t5_answers_with_int4_weights(tmp_path: Path) -> None:
    directory = tmp_path / "t5"
    zoo_seq2seq.make("t5").save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    options = {**OPTIONS, "architecture_type": "encoder-decoder", "model_type": "AutoModelForSeq2SeqLM"}
    with (
        serve(str(directory), **options) as server,
        openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client,
    ):
        done = client.completions.create(model="model", prompt="abc", max_tokens=8, temperature=0)
    assert done.usage is not None and done.usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"torch_dtype": "auto"}, r"--hqq True: needs --torch-dtype bfloat16, and auto follows .*float32"),
        ({"hqq_group_size": 256}, "--hqq True: .* not divisible by 256"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(options: dict[str, Any], words: str, checkpoints: Path) -> None:
    with serve_tiny("qwen3", checkpoints) as server:
        directory = server.directory
    settings = Settings(hf_model=str(directory), max_model_len=256, **{**OPTIONS, **options})
    with pytest.raises(StartupError, match=words) as refused:
        load_model_stack(settings, lambda _what, _share: None)
    assert "\n" not in str(refused.value)


def test_weights_that_are_quantised_already_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    settings = Settings(hf_model=str(tmp_path), **OPTIONS)
    with pytest.raises(StartupError, match=r"--hqq True: .* quantised already .*gptq"):
        load_model_stack(settings, lambda _what, _share: None)
