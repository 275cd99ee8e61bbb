"""Int4 weights on disk: the same when they come back, whole or not there, another's never taken for one's own."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.model.int4 import disk
from engine.model.int4.disk import KeptWeights, WeightWriter, checkpoint_key
from engine.model.int4.hqq import Int4Weight
from tests.int4_weights import some_weight

WEIGHTS = {"b.first": some_weight(16, 128, 64), "a.second": some_weight(48, 64, 64, seed=1)}
SHAPES = {name: weight.shape for name, weight in WEIGHTS.items()}


def write(path: Path, key: str = "key", *, names: list[str] | None = None) -> None:
    writer = WeightWriter(path, key, SHAPES, 64)
    for name in names or ["a.second", "b.first"]:  # in another order than in the file
        writer.write(name, WEIGHTS[name])
    writer.commit()


def open_kept(path: Path, key: str = "key") -> KeptWeights | None:
    return KeptWeights.open(path, key, SHAPES, 64)


def same(first: Int4Weight, second: Int4Weight) -> bool:
    pairs = ((first.codes, second.codes), (first.scales, second.scales), (first.zeros, second.zeros))
    return all(torch.equal(a, b) for a, b in pairs)


def test_weights_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "yet.safetensors"
    write(path)
    kept = open_kept(path)
    assert kept is not None
    for name in ("b.first", "a.second", "b.first"):
        assert same(kept.read(name), WEIGHTS[name])
    kept.close()
    assert [p.name for p in path.parent.iterdir()] == ["yet.safetensors"]


def test_any_reader_of_safetensors_can_read_the_file(tmp_path: Path) -> None:
    write(tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.metadata()["key"] == "key"
        assert torch.equal(file.get_tensor("a.second.codes"), WEIGHTS["a.second"].codes)
        assert torch.equal(file.get_tensor("b.first.zeros"), WEIGHTS["b.first"].zeros)
        assert file.get_tensor("checksums").shape == (2,)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-100], "bytes instead of"),
        (lambda content: content + b"more", "bytes instead of"),
        (lambda content: b"", "header"),
        (lambda content: b"\xff" * 50, "header"),
        (flip, "checksums"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "checksums"),
    ],
)
def test_a_damaged_file_is_told_removed_and_made_anew(
    damage: Any, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "w.safetensors"
    write(path)
    path.write_bytes(damage(path.read_bytes()))
    assert open_kept(path) is None
    assert words in caplog.text and "made anew" in caplog.text
    assert not path.exists()
    write(path)
    kept = open_kept(path)
    assert kept is not None
    kept.close()


def test_a_file_of_another_key_or_other_layers_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, key="another")
    assert open_kept(path) is None
    write(path)
    assert KeptWeights.open(path, "key", {**SHAPES, "c": torch.Size((16, 64))}, 64) is None
    write(path)
    assert KeptWeights.open(path, "key", SHAPES, 32) is None
    assert open_kept(tmp_path / "missing") is None


def test_what_was_not_finished_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, names=["a.second"])
    assert list(tmp_path.iterdir()) == []
    writer = WeightWriter(path, "key", SHAPES, 64)
    writer.write("a.second", WEIGHTS["a.second"])
    assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "w.safetensors")
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_costs_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    write(tmp_path / "file" / "w.safetensors")
    assert "cannot be kept" in caplog.text


def checkpoint(directory: Path, name: str = "model.safetensors", rows: int = 4) -> Path:
    directory.mkdir(exist_ok=True, parents=True)
    path = directory / name
    save_file({"w": torch.ones(rows, 4)}, path)
    return path


def test_a_key_names_content_group_size_and_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path)
    key = checkpoint_key([path], 64)
    assert checkpoint_key([str(path)], 64) == key
    assert checkpoint_key([path], 32) != key
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    touched = checkpoint_key([path], 64)
    assert touched != key, "written again, perhaps with other values"
    checkpoint(tmp_path, rows=5)
    assert checkpoint_key([path], 64) not in (key, touched)
    monkeypatch.setattr(disk, "SOLVER_VERSION", 1000)
    assert checkpoint_key([path], 64) != key
    with pytest.raises(OSError, match="missing"):
        checkpoint_key([tmp_path / "missing"], 64)


def test_files_of_the_hub_s_cache_are_named_by_their_content(tmp_path: Path) -> None:
    blob = checkpoint(tmp_path / "blobs", "0f1e2d")
    keys = []
    for revision in ("one", "two"):
        link = tmp_path / "snapshots" / revision / "model.safetensors"
        link.parent.mkdir(parents=True)
        link.symlink_to(blob)
        keys.append(checkpoint_key([link], 64))
        os.utime(blob, (0, 0))  # fetched again: another time, the same bytes
    assert keys[0] == keys[1]
