"""Checkpoints made on the spot load, never end, and have tokenizers whose prompts are of exact length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import SPECIAL_TOKENS, Shape, write_checkpoint
from benchmarks.offline import run
from benchmarks.prompts import PromptSource
from engine.build import build_engine
from engine.config import EngineConfig
from engine.model.loader import LoadRequest, load_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
# More ids than are trained, so that the filling is tested too.
SHAPE = Shape("qwen2", 20_000, SIZES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(SHAPE, directory)
    return directory


def test_the_checkpoint_loads_in_bfloat16_and_does_not_end(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert list(checkpoint.glob("*.safetensors"))
    input_ids = torch.tensor([[11, 12, 13]])
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=50)
    assert output.shape == (1, 53)


def test_every_id_decodes_to_text_and_the_template_is_chatml(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SHAPE.vocab_size
    assert all(tokenizer.decode([token]) for token in range(len(SPECIAL_TOKENS), SHAPE.vocab_size))
    chat = AutoTokenizer.from_pretrained(checkpoint)
    text = chat.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_text_survives_encoding(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = "def f(x):\n    return 'naïve 日本語 🙂'"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_prompts_have_exact_lengths_and_differ(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    source = PromptSource(checkpoint, seed=1)
    prompts = [source.make(length) for length in (1, 20, 300, 300)]
    assert [len(tokenizer.encode(prompt).ids) for prompt in prompts] == [1, 20, 300, 300]
    assert prompts[2] != prompts[3]
    assert PromptSource(checkpoint, seed=1).make(1) == prompts[0]


def test_the_offline_run_accounts_for_every_token(checkpoint: Path) -> None:
    loaded = load_model(LoadRequest(str(checkpoint)), lambda _what, _share: None)
    config = EngineConfig(max_num_seqs=3, max_batch_tokens=32, max_model_len=64)
    engine = build_engine(loaded, config, lambda _what, _share: None)
    timings = run(engine, num_clients=3, num_prompt_tokens=20, num_new_tokens=6, vocab_size=loaded.vocab_size)
    assert timings.num_output_tokens == 18
    assert timings.prefill_ms
    assert timings.decode_ms
    assert "18 tokens" in timings.summary()
