"""Locks between processes and threads of one machine, which end with the process that holds them.

The system's own lock on an open file: a killed holder leaves nothing to clean up, and two holders
keep apart even in threads of one process. Ours and not the `filelock` library's: that one always
locks a file of its own, while a trace's folder is locked itself and holds the trace alone; and it
would be one more library for a few lines. Not for folders that machines share over a network.
Knows files. Knows nothing of what is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


class Lock:
    """One lock file. Held until `release`, or until its process ends, however it does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def take(self, patience_s: float = 0.0) -> bool:
        """Whether the lock is ours now; tried until it is, or until time is up."""
        deadline = time.monotonic() + patience_s
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file = file
                return True
            except OSError:
                if time.monotonic() >= deadline:
                    os.close(file)
                    return False
                time.sleep(0.05)

    def __enter__(self) -> Lock:
        while not self.take(60.0):
            pass
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others take it; nothing happens if it is not held."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder that is there for one read-change-write; others wait as long as it takes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
