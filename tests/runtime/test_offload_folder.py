"""A process's directory is its own while it lives, and nobody's afterwards."""

from __future__ import annotations

import gc
from pathlib import Path

from runtime.offload_folder import OffloadFolder


def test_a_directory_is_made_once_and_only_when_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "offload"
    folder = OffloadFolder(root)
    assert not root.exists()
    assert folder.take() == folder.take() and folder.take().parent == root


def test_directories_of_ended_processes_are_swept_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    living, ended = OffloadFolder(tmp_path), OffloadFolder(tmp_path)
    kept, left = living.take(), ended.take()
    (kept / "weight.safetensors").write_bytes(b"1")
    (left / "weight.safetensors").write_bytes(b"2")
    assert kept != left
    del ended  # its lock goes, as with a process that ends
    gc.collect()
    another = OffloadFolder(tmp_path)
    assert another.take() not in (kept, left)
    assert (kept / "weight.safetensors").read_bytes() == b"1"
    assert not left.exists()
