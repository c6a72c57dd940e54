"""Processes go to cores in turn, threads and all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from loadmaster.workers.demo.pinning import pin_in_turn

THREADED = """
import sys, threading, time
threads = [threading.Thread(target=time.sleep, args=(30,), daemon=True) for _ in range(2)]
[t.start() for t in threads]
print("ready", flush=True)
time.sleep(30)
"""


@pytest.fixture
def sleepers() -> Iterator[list[int]]:
    """Three processes of three threads each."""
    started = [
        subprocess.Popen([sys.executable, "-c", THREADED], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in started:
        assert process.stdout is not None and process.stdout.readline()
    yield [process.pid for process in started]
    for process in started:
        process.kill()
        process.communicate()


def test_every_thread_goes_to_its_process_core(sleepers: list[int]) -> None:
    pin_in_turn(sleepers)
    cores = sorted(os.sched_getaffinity(0))
    for place, pid in enumerate(sleepers):
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        assert len(threads) == 3
        assert {frozenset(os.sched_getaffinity(t)) for t in threads} == {
            frozenset({cores[place % len(cores)]})
        }


def test_a_process_that_has_ended_is_passed_over(sleepers: list[int]) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    pin_in_turn([gone.pid, sleepers[0]])
    cores = sorted(os.sched_getaffinity(0))
    assert os.sched_getaffinity(sleepers[0]) == {cores[1 % len(cores)]}
