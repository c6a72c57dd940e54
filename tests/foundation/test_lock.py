"""Locks: one holder at a time, threads of one process too, and none left by a killed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from loadmaster.foundation.lock import Lock, folder_lock

Hold = Callable[[Path], AbstractContextManager[object]]
BOTH = pytest.mark.parametrize("hold", [lambda folder: Lock(folder / "lock"), folder_lock],
                               ids=["file", "folder"])


@BOTH
def test_threads_of_one_process_take_turns(hold: Hold, tmp_path: Path) -> None:
    """Read, change, write: without turns some of the 40 additions are lost."""
    total = tmp_path / "total"
    total.write_text("0")

    def add() -> None:
        for _ in range(10):
            with hold(tmp_path):
                before = int(total.read_text())
                os.sched_yield()
                total.write_text(str(before + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total.read_text() == "40"


HOLDER = """
import sys, time
from pathlib import Path
from loadmaster.foundation.lock import Lock, folder_lock
folder = Path(sys.argv[2])
with Lock(folder / "lock") if sys.argv[1] == "file" else folder_lock(folder):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_holder_leaves_nothing_to_clean_up(kind: str, tmp_path: Path) -> None:
    held = subprocess.Popen(
        [sys.executable, "-c", HOLDER, kind, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    if kind == "file":
        assert not Lock(tmp_path / "lock").take()
    taken = threading.Event()

    def wait() -> None:
        with Lock(tmp_path / "lock") if kind == "file" else folder_lock(tmp_path):
            taken.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not taken.wait(0.3)
    held.send_signal(signal.SIGKILL)
    held.wait()
    held.stdout.close()
    assert taken.wait(60)
    waiting.join()


def test_an_error_inside_lets_the_folder_go(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), folder_lock(tmp_path):
        raise RuntimeError
    with folder_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []       # the folder itself is locked: no file in it


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), folder_lock(tmp_path / "absent"):
        pass
    assert not (tmp_path / "absent").exists()
