"""The checkpoint that transcription servers are compared on says what it should, and the results are read right."""

from __future__ import annotations

import io
import wave
from pathlib import Path

from transformers import AutoConfig, AutoProcessor, GenerationConfig

from benchmarks.compare import named
from benchmarks.seq2seq import Shape
from benchmarks.transcribe import Turn, recording, results, write_speech_checkpoint
from runtime.speech_model import speech_model_of

SIZES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 1), ("attention_heads", 1), ("ffn_dim", 8))
}


def test_a_speech_checkpoint_never_ends_before_its_last_position(tmp_path: Path) -> None:
    shape = Shape("whisper", {"vocab_size": 51_865, "d_model": 8, **SIZES})
    write_speech_checkpoint(shape, tmp_path, num_new_tokens=20, has_language=True)
    generation = GenerationConfig.from_pretrained(tmp_path)
    tokenizer = AutoProcessor.from_pretrained(tmp_path).tokenizer
    model = speech_model_of(AutoConfig.from_pretrained(tmp_path), generation, tokenizer)
    # As in the checkpoints of the hub.
    assert (model.end_id, model.start_id, model.first_timestamp_id) == (50_256, 50_257, 50_363)
    assert len(model.language_ids) == 99 and model.default_language == "en"
    assert model.suppressed_ids == (model.end_id,)
    assert model.max_target_positions == generation.max_length == 24
    assert tokenizer.decode([262, 300]).strip()


def test_a_recording_is_one_window_and_none_is_like_another() -> None:
    with wave.open(io.BytesIO(recording(1))) as file:
        assert (file.getnframes(), file.getframerate(), file.getnchannels()) == (480_000, 16_000, 1)
    assert recording(1) == recording(1) != recording(2)


def test_rates_are_those_of_all_clients_and_ratios_to_the_first_servers_mean() -> None:
    turns = [Turn("a", 10.0, (9.0, 10.0), 1.0), Turn("b", 30.0, (15.0, 30.0), 1.0), Turn("a", 15.0, (1.0, 15.0), 1.0)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results(turns).splitlines()[2:]]
    assert [row[2] for row in rows] == ["6.00", "2.00", "4.00"]
    assert [row[4] for row in rows] == ["1.00", "2.50", "1.00"]


def test_our_own_server_is_named_with_options_and_others_with_commands() -> None:
    assert named("ours")[1].endswith("--accelerator-type cpu")
    assert named("ours-compiled=--torch-compile True")[1].endswith("--accelerator-type cpu --torch-compile True")
    assert named("tf=serve --port {port} --x=1 {model}") == ("tf", "serve --port {port} --x=1 {model}")
