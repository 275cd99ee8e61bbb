"""The paged kernel compiles to machine code for a GPU, in sizes that consumer cards hold, though none is here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES_OF_CONSUMER_CARDS = 99 * 1024


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_the_kernel_compiles_for_a_gpu_and_fits_its_fast_memory(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.engine.model.compile_paged_kernel"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 16
    assert max(sizes) <= SHARED_BYTES_OF_CONSUMER_CARDS
