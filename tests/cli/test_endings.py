"""A verb that is told to end, by whichever signal, ends as on Ctrl-C; nohup keeps it running."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadmaster.cli.endings import interrupted_on_endings

# A verb that says when it is at work, and takes far longer than the test.
LONG = """
import sys, time
from loadmaster.cli import main as entry
from loadmaster.traces.synth import generate

seconds = float(sys.argv.pop())

def slow(**options):
    print("at work", flush=True)
    time.sleep(seconds)

generate.synth_trace = slow
entry.main()
"""


def begin(folder: Path, seconds: str, hangup: signal.Handlers) -> subprocess.Popen[str]:
    """hangup: what SIGHUP does to the verb at its start; whoever runs the tests may ignore it."""
    def as_a_shell_would() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, hangup)

    process = subprocess.Popen(
        [sys.executable, "-c", LONG, "trace", "synth", "--out", str(folder / "new"), seconds],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_a_shell_would,
    )
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    return process


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_ends_a_verb_in_one_line(tmp_path: Path, ending: signal.Signals) -> None:
    process = begin(tmp_path, "600", signal.SIG_DFL)
    process.send_signal(ending)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "loadmaster: interrupted; nothing half-written is left in place\n"
    assert not list(tmp_path.iterdir())


def test_a_hangup_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    process = begin(tmp_path, "3", signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    with interrupted_on_endings():
        assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before
