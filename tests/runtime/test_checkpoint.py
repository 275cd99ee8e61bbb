"""Sizes of stored weights, from headers alone: of directories, of the hub's cache, and of what is broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from runtime.checkpoint import HeadersOutOfReach, NoWeights, read_stored_weights
from tests.zoo import make


def write_header(path: Path, header: Any, *, length: int | None = None) -> None:
    """A safetensors file without its data."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)


def test_a_file_s_tensors_are_counted_by_dtype(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros((), dtype=torch.int64),
        "d": torch.zeros(11, dtype=torch.float8_e4m3fn),
        "e": torch.zeros(2, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = read_stored_weights(str(tmp_path), None)
    assert stored.bytes_by_dtype == {"float32": 60, "bfloat16": 14, "I64": 8, "F8_E4M3": 11, "BOOL": 2}
    assert (stored.num_files, stored.num_tensors, stored.num_bytes) == (1, 5, 95)
    assert stored.main_dtype == "float32"


def test_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    model, _ = make("llama")
    model.save_pretrained(tmp_path, max_shard_size="100kB")
    # Beside them lies what no index names, such as the same weights in another form.
    save_file({"other": torch.zeros(1000)}, tmp_path / "consolidated.safetensors")
    stored = read_stored_weights(str(tmp_path), None)
    assert stored.num_files == len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert stored.num_bytes == sum(p.nbytes for p in model.parameters())
    assert stored.num_tensors == len(list(model.parameters()))


def test_only_the_header_is_read(tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", {"w": {"dtype": "BF16", "shape": [10**6, 10**6]}})
    assert read_stored_weights(str(tmp_path), None).num_bytes == 2 * 10**12


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "BF16"}},
        {"w": {"dtype": "BF16", "shape": ["a"]}},
        {"w": {"dtype": "NOVEL", "shape": [1]}},
        {"w": {"dtype": [], "shape": [1]}},
        {"w": 1},
        [],
    ],
)
def test_a_broken_header_is_refused(header: Any, tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", header)
    with pytest.raises(NoWeights):
        read_stored_weights(str(tmp_path), None)


@pytest.mark.parametrize("content", [b"", b"\0\0", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 9) + b"\xff{"])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(NoWeights, match=r"model\.safetensors cannot be read"):
        read_stored_weights(str(tmp_path), None)


@pytest.mark.parametrize(
    "index", ["", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "missing.safetensors"}}']
)
def test_a_broken_index_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(NoWeights, match="cannot be read"):
        read_stored_weights(str(tmp_path), None)


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(NoWeights, match=r"has neither model\.safetensors nor"):
        read_stored_weights(str(tmp_path), None)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_model_in_the_hub_s_cache_needs_no_network(
    is_sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    names = ["model-1.safetensors", "model-2.safetensors"] if is_sharded else ["model.safetensors"]
    if is_sharded:
        index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in names[1:]:
        write_header(snapshot / name, {"w1": {"dtype": "F16", "shape": [4]}})
    with pytest.raises(HeadersOutOfReach):  # the first file is not there yet, and the tests are offline
        read_stored_weights("some/model", None)
    write_header(snapshot / names[0], {"w0": {"dtype": "F16", "shape": [4]}})
    assert read_stored_weights("some/model", None).bytes_by_dtype == {"float16": 8 * len(names)}
    assert read_stored_weights("some/model", commit).num_files == len(names)
    with pytest.raises(HeadersOutOfReach):
        read_stored_weights("some/model", "another")
