"""What starts processes must not decide what becomes of signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from loadmaster.foundation.signals import hangups_held_back, terminations_kept


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Signals that this process got, instead of ending it."""
    got: list[int] = []
    before = {one: signal.signal(one, lambda number, frame: got.append(number))
              for one in (signal.SIGHUP, signal.SIGTERM)}
    yield got
    for one, handler in before.items():
        signal.signal(one, handler)


def soon(heard: list[int]) -> list[int]:
    """What was heard, a moment later: the system may hand a signal to a thread of its choice."""
    until = time.monotonic() + 5.0
    while not heard and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)            # a second one would come by now
    return heard


def test_a_hangup_waits_and_then_comes(heard: list[int]) -> None:
    with hangups_held_back():
        os.kill(os.getpid(), signal.SIGHUP)
        assert heard == []
    assert soon(heard) == [signal.SIGHUP]


def test_a_hangup_that_another_thread_takes_waits_too(heard: list[int]) -> None:
    """Whoever is free gets a process's signal: here a thread that does not block it."""
    free, done = threading.Event(), threading.Event()

    def idle() -> None:
        free.set()
        done.wait(30)

    other = threading.Thread(target=idle)
    other.start()
    free.wait(30)
    with hangups_held_back():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.05)
        assert heard == []
    done.set()
    other.join()
    assert soon(heard) == [signal.SIGHUP]


def test_what_is_started_meanwhile_outlives_a_hangup() -> None:
    sleep = [sys.executable, "-c", "print('up', flush=True); input()"]
    with hangups_held_back():
        child = subprocess.Popen(sleep, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGHUP)
    child.communicate("\n", timeout=30)
    assert child.returncode == 0


def test_termination_stays_ours_where_it_was(heard: list[int]) -> None:
    with terminations_kept():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)      # as a library may
    os.kill(os.getpid(), signal.SIGTERM)
    assert soon(heard) == [signal.SIGTERM]


def test_a_default_gives_way() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with terminations_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
