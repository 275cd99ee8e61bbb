"""What this machine lets the process use: cores and free memory, with a container's limits counted.

Knows nothing of models or settings; torch is imported only to ask a device.
Called by model_loading.py, placing.py, planning.py and engine_thread.py.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def usable_cores(cgroup: Path = _CGROUP, cpus: Path = _CPUS) -> int:
    """Physical cores that this process may run on, at least 1.

    Two threads of one core share its arithmetic units: matrix products gain nothing from the second and lose cache.
    A container's quota is a limit too: threads above it are stopped in the middle of a product while the others wait.
    """
    cores = _affine_cores(cpus) if sys.platform == "linux" else psutil.cpu_count(logical=False)
    quota = _cpu_quota(cgroup)
    return max(1, min(cores or 1, quota or sys.maxsize))


def free_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Bytes of main memory that can still be taken without swapping, within a container's limit where there is one."""
    free = psutil.virtual_memory().available
    limit, used = _read_number(cgroup / "memory.max"), _read_number(cgroup / "memory.current")
    if limit is None or used is None:  # the older layout of control groups
        limit = _read_number(cgroup / "memory" / "memory.limit_in_bytes")
        used = _read_number(cgroup / "memory" / "memory.usage_in_bytes")
    if limit is None or used is None:
        return free
    # Cached files count as used, but leave when memory is needed.
    return max(0, min(free, limit - used + _inactive_file_bytes(cgroup)))


def free_bytes_on(device: str) -> int:
    """Bytes of memory that can still be taken on a device: cpu, mps, cuda or one card of several (cuda:1)."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if device == "mps":
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(int(left), free_memory_bytes())
    return free_memory_bytes()


def give_free_memory_back() -> None:
    """Return what was freed to the system, where the C library would keep it for the next allocation (glibc).

    After a burst of prompts 440 MiB of freed activations stayed resident otherwise.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another system, another C library
        return
    trim(0)


def _affine_cores(cpus: Path) -> int | None:
    if sys.platform != "linux":
        return None
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:  # not shown in every sandbox: count it as a core of its own
            cores.add(str(cpu))
    return len(cores)


def _cpu_quota(cgroup: Path) -> int | None:
    """Whole cores of a container's quota, rounded up; None without one."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota = str(_read_number(cgroup / "cpu" / "cpu.cfs_quota_us") or "max")
        period = str(_read_number(cgroup / "cpu" / "cpu.cfs_period_us") or 100_000)
    if not (quota.isdigit() and period.isdigit() and int(period)):  # "max", or -1: no quota
        return None
    return -(-int(quota) // int(period))


def _inactive_file_bytes(cgroup: Path) -> int:
    new, old = cgroup / "memory.stat", cgroup / "memory" / "memory.stat"
    for path, key in ((new, "inactive_file"), (old, "total_inactive_file")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.lstrip("-").isdigit() else None
