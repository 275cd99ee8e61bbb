"""A directory for weights that wait on the disk in another form than the checkpoint's; swept when its process is gone.

Knows nothing of models.
Kept by runtime/model_loading.py with all that serves a model. A server's last act is to exit at once, with no moment to
tidy up, so the next one that starts does it: a directory belongs to whoever holds its lock, and a dead process holds
none.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"


class OffloadFolder:
    """A directory of this process's own, made when it is first asked for; others leave it alone while this is there.

    Args:
        root: where such directories are.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock: FileLock | None = None

    def take(self) -> Path:
        """The directory; those of ended processes are removed on the way.

        Raises:
            OSError: it cannot be made.
        """
        if self._lock is None:
            self._root.mkdir(parents=True, exist_ok=True)
            with FileLock(self._root / _LOCK):  # nobody sweeps one that is not locked yet
                for folder in self._root.iterdir():
                    if folder.is_dir():
                        _remove_if_left(folder)
                made = Path(tempfile.mkdtemp(prefix="weights-", dir=self._root))
                # Not bound to the thread that loads: it is given up when this object goes.
                self._lock = FileLock(made / _LOCK, thread_local=False)
                self._lock.acquire()
        return Path(self._lock.lock_file).parent


def _remove_if_left(folder: Path) -> None:
    lock = FileLock(folder / _LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # somebody's, or not ours to remove
        return
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)
