"""One directory of tiny checkpoints for all end-to-end tests.

Knows nothing of what they ask.
Read by pytest.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")
