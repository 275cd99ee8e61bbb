"""Looks into a few steps of each kind with torch's profiler: Chrome traces for the eye, a table for the log.

Knows nothing of what a step computes.
Used by engine.py, and only there where --torch-profiling is on; an engine without a profiler pays nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

Kind = Literal["prefill", "decode"]  # of a batch, as the scheduler says

WARM_UP_STEPS = 3  # the first steps allocate and choose kernels: they are not what the others are like
PROFILED_STEPS = 4
TABLE_ROWS = 15


class StepProfiler:
    """Profiles PROFILED_STEPS steps of each kind after a warm-up, then rests until it is asked again.

    Args:
        directory: where traces go; made when the first one is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seen: dict[Kind, int] = {"prefill": 0, "decode": 0}
        self._round = 0

    def again(self) -> None:
        """Profile the next steps of each kind; may be called from any thread."""
        self._round += 1
        self._seen = {"prefill": WARM_UP_STEPS, "decode": WARM_UP_STEPS}

    @contextmanager
    def step(self, kind: Kind) -> Iterator[None]:
        """The block is one step of that kind; each profiled one writes a trace, the last of a round logs its table."""
        number = self._seen[kind]
        self._seen[kind] = number + 1
        if not WARM_UP_STEPS <= number < WARM_UP_STEPS + PROFILED_STEPS:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            yield
        self._report(kind, number - WARM_UP_STEPS + 1, profiler)

    def _report(self, kind: Kind, number: int, profiler: profile) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{kind}-{self._round}-{number}.json"
        profiler.export_chrome_trace(str(path))
        logger.info("profiled a %s step (%d of %d): %s", kind, number, PROFILED_STEPS, path)
        if number == PROFILED_STEPS:
            order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=48)
            logger.info("the last profiled %s step\n%s", kind, table)
