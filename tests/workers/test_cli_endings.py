"""A group whose terminal closes, and one that is killed: what is left, and who says so."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loadmaster.workers.group.group import contiguous
from loadmaster.workers.protocol.settings import served_spec

NOTICED_S = 15.0      # by a process that first imports everything; the look itself takes far less


class OnTerminal:
    """`loadmaster run` as the leader of a terminal of its own."""

    def __init__(self, name: str, model: Path, tmp: Path) -> None:
        self.name, self.folder = name, tmp / f"loadmaster-{os.getuid()}" / name
        self._leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loadmaster.cli", "run", "--model", str(model), "--ranks", "2",
             "--name", name],
            stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"TMPDIR": str(tmp), "RAY_TMPDIR": tempfile.gettempdir()},
        )
        os.close(follower)
        self._said = b""
        deadline = time.monotonic() + 120
        while b"from another shell" not in self._said:
            assert time.monotonic() < deadline, self._said
            self._said += os.read(self._leader, 4096)

    def hang_up(self) -> None:
        """Close the terminal."""
        os.close(self._leader)

    def others(self) -> list[str]:
        """Processes of its session that still live, itself left out."""
        listed = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(self.process.pid)],
                                capture_output=True, text=True, check=False).stdout
        rows = [line.split() for line in listed.splitlines()]
        return [pid for pid, stat in rows if "Z" not in stat and int(pid) != self.process.pid]


@pytest.mark.slow
def test_a_group_ends_with_its_terminal_and_a_killed_one_is_named_and_begun_anew(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, plan = checkpoint("qwen3_moe"), tmp_path / "plan.json"
    contiguous(served_spec(model, "bfloat16"), 2).save(plan)
    name = f"ending-{os.getpid()}"

    killed = OnTerminal(name, model, tmp_path)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(30)
    assert (killed.folder / "address.json").exists()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "loadmaster.cli", "apply", str(plan), "--name", name],
        capture_output=True, text=True, timeout=60, env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 1 and time.monotonic() - began < NOTICED_S
    assert len(done.stderr.splitlines()) == 1
    assert f"group '{name}' ran at " in done.stderr
    assert f"`loadmaster run --name {name}` starts it again" in done.stderr

    again = OnTerminal(name, model, tmp_path)
    again.hang_up()
    assert again.process.wait(60) == 0
    assert not again.folder.exists()
    deadline = time.monotonic() + 30
    while again.others():
        assert time.monotonic() < deadline, again.others()
        time.sleep(0.2)
