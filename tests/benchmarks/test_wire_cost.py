"""The benchmark of the server's own cost runs, and what it measures is not far off its limit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "wire_cost.py"
# The limit is 60 where nothing else runs; a regression that matters (a task or a thread a token) is beyond this.
MAX_US_A_TOKEN = 180


def test_a_streamed_token_costs_little() -> None:
    command = [sys.executable, str(SCRIPT), "--streams", "64", "--tokens", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"64 streams x 100 tokens: ([\d.]+) us .*, ([\d.]+) frames a token", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) < MAX_US_A_TOKEN
    assert float(found[2]) > 0.5
