"""What all tests on a GPU have in common."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 without TF32, so that the order of operations is all that differs between two ways."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
