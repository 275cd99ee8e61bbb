"""The whole server around a tiny random model: real loading, real engine, real HTTP on a port of its own.

Knows nothing of what the tests ask.
Called by the end-to-end tests.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from app import create_app
from config import Settings
from model_manager import ModelManager
from tests import zoo
from tests.api.scripted import CHAT_TEMPLATE


@dataclass(frozen=True, slots=True)
class TinyServer:
    """A running server and the model directory it loaded."""

    url: str
    manager: ModelManager
    directory: Path

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"{self.url}/v1"


def utf8_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte that UTF-8 can have, and three special ones in the place of the others: all within 256."""
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    alphabet = [char for char, byte in byte_of_char().items() if byte not in never_in_utf8]
    backend = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(sorted(alphabet))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def byte_of_char() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for (the table of GPT-2's encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def save_tiny(name: str, directory: Path, *, max_positions: int | None = None) -> Path:
    """The zoo's model as a checkpoint with a byte-level tokenizer; made once a directory."""
    target = directory / f"{name}-{max_positions}"
    if not target.exists():
        model, _ = zoo.make(name)
        if max_positions is not None:
            model.config.max_position_embeddings = max_positions
        model.save_pretrained(target)
        utf8_tokenizer().save_pretrained(target)
    return target


@contextlib.contextmanager
def serve_tiny(name: str, directory: Path, *, max_positions: int | None = None, **options: Any) -> Iterator[TinyServer]:
    """Serve the zoo's model in float32 until the block ends."""
    path = save_tiny(name, directory, max_positions=max_positions)
    with serve(str(path), **{"max_model_len": 256, **options}) as server:
        yield server


@contextlib.contextmanager
def serve(model: str, **options: Any) -> Iterator[TinyServer]:
    """Serve a model, by its directory or as --hf-model names it, in float32 until the block ends."""
    settings = Settings(**{"hf_model": model, "torch_dtype": "float32", "shutdown_timeout": 2, **options})
    manager = ModelManager(settings)
    config = uvicorn.Config(create_app(settings, manager), log_config=None, lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while manager.state != "ready":
                assert thread.is_alive() and manager.state != "dead", "the server did not start"
                time.sleep(0.02)
            yield TinyServer(f"http://127.0.0.1:{listening.getsockname()[1]}", manager, Path(model))
        finally:
            server.should_exit = True
            thread.join(20)
