"""Memory is given back, and nothing is lost by it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.model.resident import release_pages, trim_heap


def resident_file_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssFile")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what Linux says of this process")
def test_pages_of_a_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    values = torch.arange(4 * 2**20, dtype=torch.int32)  # 16 MiB
    save_file({"a": values, "b": values + 1}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt", backend="mmap") as file:
        tensor, other = file.get_slice("a")[...], file.get_slice("b")[...]
        assert torch.equal(tensor, values)
        before = resident_file_bytes()
        release_pages(tensor)
        assert before - resident_file_bytes() > 15 * 2**20
        assert torch.equal(tensor, values) and torch.equal(other, values + 1)


@pytest.mark.parametrize(
    "tensor", [torch.arange(2**20), torch.arange(2**20).view(1024, 1024).t(), torch.arange(3), torch.empty(0)]
)
def test_other_memory_keeps_its_values(tensor: torch.Tensor) -> None:
    before = tensor.clone()
    release_pages(tensor)
    assert torch.equal(tensor, before)


def test_trimming_the_heap_harms_nothing() -> None:
    kept = [torch.randn(10_000) for _ in range(10)]
    copies = [tensor.clone() for tensor in kept]
    trim_heap()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
