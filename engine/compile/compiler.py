"""Has steps compiled in a process of its own, and finds those that an earlier start has left on disk.

Knows nothing of what a step computes or of whether compiled code is right: compile/steps.py tries it.
Made by compile/steps.py; the process is compile/worker.py.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.compile.skeleton import Skeleton
from engine.compile.worker import Job, package_path

logger = logging.getLogger(__name__)

# A killed process is started again for what it left undone; after that the server stays as it is.
MAX_ATTEMPTS = 2
_CXX = ("g++", "clang++", "c++", "cl")
_ROOT = Path(__file__).parent.parent.parent
_END_S = 5.0


@dataclass(frozen=True, slots=True)
class Package:
    """Compiled code of a step of `size` rows; `seconds` is what compiling took, None where it was found on disk."""

    size: int
    path: Path
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Failure:
    """Steps of `size` rows cannot be compiled."""

    size: int
    reason: str


class Compiler:
    """Compiles one skeleton's steps; request and take belong to one thread, close to any.

    Args:
        skeleton: of the step.
        cache: where packages of all skeletons are kept.
        is_autotuned: whether kernels are chosen by measuring.
        niceness: how far the compiling process steps back behind others: serving comes first.
        worker: the command that compiles; for tests.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        cache: Path,
        *,
        is_autotuned: bool,
        niceness: int = 5,
        worker: Series[str] = (sys.executable, "-m", "engine.compile.worker"),
    ) -> None:
        self._skeleton = skeleton
        self._is_autotuned = is_autotuned
        self._niceness = niceness
        self._worker = tuple(worker)
        self._num_threads = torch.get_num_threads()
        variant = f"{self._num_threads}-threads{'-autotuned' if is_autotuned else ''}"
        self.directory = cache / skeleton.fingerprint / variant
        self._results: deque[Package | Failure] = deque()
        self._wake: Callable[[], None] = lambda: None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Call `wake`, on any thread, whenever take() has something new."""
        self._wake = wake
        if self._results:
            wake()

    def has_results(self) -> bool:
        """Whether take() gives one."""
        return bool(self._results)

    def take(self) -> Package | Failure | None:
        """The next result, None when there is none yet."""
        return self._results.popleft() if self._results else None

    def request(self, sizes: Series[int]) -> None:
        """Find or compile steps of these numbers of rows, in this order."""
        missing = []
        for size in sizes:
            found = self._find(size)
            if found is None:
                missing.append(size)
            else:
                self._report(Package(size, found, None))
        if not missing:
            return
        if not any(map(shutil.which, _CXX)):  # for CUDA too: what launches the kernels is C++
            for size in missing:
                self._report(Failure(size, f"no C++ compiler was found (one of {', '.join(_CXX)})"))
            return
        what = "steps of %s sequences" if self._skeleton.source is None else "encoders of %s sources"
        logger.info(f"compiling {what} behind; eager until then", ", ".join(map(str, missing)))
        threading.Thread(target=self._compile, args=(tuple(missing),), name="compiler", daemon=True).start()

    def discard(self, package: Package) -> None:
        """Remove a package that is of no use."""
        package.path.unlink(missing_ok=True)

    def close(self) -> None:
        """End what runs."""
        with self._lock:
            self._is_closed = True
            process = self._process
        if process is not None:
            process.kill()

    def _find(self, size: int) -> Path | None:
        """A whole package; others are removed."""
        for path in sorted(self.directory.glob(f"{size}-*.pt2")):
            if package_path(self.directory, size, path.read_bytes()) == path:
                return path
            logger.warning("%s is damaged: removed, to be compiled again", path)
            path.unlink(missing_ok=True)
        return None

    def _report(self, result: Package | Failure) -> None:
        self._results.append(result)
        self._wake()

    def _compile(self, sizes: tuple[int, ...]) -> None:
        """On a thread of its own."""
        left, reason = sizes, ""
        for _ in range(MAX_ATTEMPTS):
            try:
                left, reason = self._run(left)
            except OSError as error:
                reason = f"{type(error).__name__}: {error}"
            if not left or self._is_closed:
                return
        for size in left:
            self._report(Failure(size, reason))

    def _run(self, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """One process; the sizes of which it said nothing, and its last words."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # code that we load lies here
        scratch = Path(tempfile.mkdtemp(prefix="compiling-", dir=self.directory))
        try:
            log = scratch / "log"
            job = Job(
                self._skeleton, sizes, self.directory, scratch, self._num_threads, self._is_autotuned, self._niceness
            )
            left = dict.fromkeys(sizes)
            with log.open("wb") as errors, self._start(errors) as process:
                assert process.stdin is not None and process.stdout is not None
                try:
                    process.stdin.write(pickle.dumps(job))
                    process.stdin.flush()  # and it stays open: its end tells the process that we have ended
                    for line in process.stdout:
                        left.pop(self._read(json.loads(line)))
                except (OSError, ValueError, KeyError) as error:
                    logger.debug("the compiling process broke off", exc_info=error)
                    process.kill()
            words = log.read_text(errors="replace").strip().splitlines() or [""]
            return tuple(left), f"the compiling process ended with code {process.returncode}: {words[-1][:200]}"
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _start(self, errors: object) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._is_closed:
                raise OSError("closed")
            self._process = subprocess.Popen(
                self._worker, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors  # type: ignore[call-overload]
            )  # fmt: skip
            return self._process

    def _read(self, line: dict[str, object]) -> int:
        size = int(str(line["size"]))
        if "error" in line:
            self._report(Failure(size, str(line["error"])))
        else:
            self._report(Package(size, Path(str(line["path"])), float(str(line["seconds"]))))
        return size
