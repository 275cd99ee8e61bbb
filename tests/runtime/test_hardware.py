"""What a machine, or a container on it, allows."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import psutil
import pytest

from runtime.hardware import free_memory_bytes, give_free_memory_back, usable_cores

MIB = 2**20


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def four_threads_of_two_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cpus = tmp_path / "cpu"
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list", f"{siblings}\n")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    return cpus


def test_threads_of_one_core_count_once(four_threads_of_two_cores: Path, tmp_path: Path) -> None:
    assert usable_cores(tmp_path, four_threads_of_two_cores) == 2


def test_only_cores_the_process_may_use_count(
    four_threads_of_two_cores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3}, raising=False)
    assert usable_cores(tmp_path, four_threads_of_two_cores) == 1


def test_without_topology_every_thread_is_a_core(tmp_path: Path, four_threads_of_two_cores: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "nothing") == 4


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("150000 100000", 2), ("max 100000", 2), ("x", 2)])
def test_a_container_s_quota_is_a_bound(
    quota: str, cores: int, tmp_path: Path, four_threads_of_two_cores: Path
) -> None:
    write(tmp_path / "group" / "cpu.max", quota)
    assert usable_cores(tmp_path / "group", four_threads_of_two_cores) == cores


@pytest.mark.parametrize(("quota", "cores"), [("100000", 1), ("-1", 2)])
def test_the_older_layout_of_control_groups_counts_too(
    quota: str, cores: int, tmp_path: Path, four_threads_of_two_cores: Path
) -> None:
    write(tmp_path / "group" / "cpu" / "cpu.cfs_quota_us", quota)
    write(tmp_path / "group" / "cpu" / "cpu.cfs_period_us", "100000")
    assert usable_cores(tmp_path / "group", four_threads_of_two_cores) == cores


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 0 < free_memory_bytes() <= psutil.virtual_memory().total


def test_a_container_s_memory_limit_is_a_bound_and_cached_files_can_be_reclaimed(tmp_path: Path) -> None:
    write(tmp_path / "memory.max", str(64 * MIB))
    write(tmp_path / "memory.current", str(40 * MIB))
    assert free_memory_bytes(tmp_path) == 24 * MIB
    write(tmp_path / "memory.stat", f"anon 1\ninactive_file {10 * MIB}\n")
    assert free_memory_bytes(tmp_path) == 34 * MIB
    write(tmp_path / "memory.current", str(90 * MIB))
    assert free_memory_bytes(tmp_path) == 0


def test_no_limit_is_no_bound(tmp_path: Path) -> None:
    write(tmp_path / "memory.max", "max\n")
    write(tmp_path / "memory.current", "1")
    assert free_memory_bytes(tmp_path) > 64 * MIB


def test_the_older_layout_of_memory_limits_counts_too(tmp_path: Path) -> None:
    write(tmp_path / "memory" / "memory.limit_in_bytes", str(64 * MIB))
    write(tmp_path / "memory" / "memory.usage_in_bytes", str(60 * MIB))
    write(tmp_path / "memory" / "memory.stat", f"total_inactive_file {MIB}\n")
    assert free_memory_bytes(tmp_path) == 5 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return memory by themselves")
def test_freed_memory_goes_back_to_the_system() -> None:
    process = psutil.Process()
    blocks = [bytearray(60_000) for _ in range(2000)]  # below the size that is mapped for itself
    last = bytearray(60_000)  # keeps the heap's end in use, so that freeing the others returns nothing
    full = process.memory_info().rss
    del blocks
    give_free_memory_back()
    assert process.memory_info().rss < full - 60 * 2**20
    assert last
