"""Where a terminal or a pipe cannot write a character, it is spelled: no print fails for it."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from loadmaster.cli.spelling import SPELL, one_line, writable
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.synth.generate import synth_trace

from .test_cli import SMALL

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "", "PYTHONCOERCECLOCALE": "0"}
UTF8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": ""}


@pytest.mark.parametrize(("text", "spelled"), [
    ("+1.0 ± 0.3", "+1.0 +- 0.3"), ("4 \N{MULTIPLICATION SIGN} 4 ≤ µ …", "4 x 4 <= u ..."),
    ("café", "cafe"), ("中", "\\u4e2d"), ("bad \udcff name", "bad \\udcff name"),
    ("plain", "plain"),
])
def test_what_cannot_be_written_is_spelled(text: str, spelled: str) -> None:
    assert text.encode("ascii", SPELL).decode() == spelled


def test_what_can_be_written_stays() -> None:
    utf8 = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert writable("± 中", utf8) == "± 中"
    assert writable("± 中", latin) == "± \\u4e2d"


def test_a_text_of_several_lines_becomes_one() -> None:
    assert one_line("a\nb\x1b[31mc\tü") == "a\\nb\\x1b[31mc\\tü"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spelling")
    save_trace(synth_trace(layers=2, experts=16, top_k=2, tokens=6000, request_tokens=50),
               folder / "trace")
    return folder


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize(("encoding", "band"), [(ASCII, "+-"), (UTF8, "±")], ids=["C", "UTF-8"])
def test_a_table_with_bands_is_printed_everywhere(
    folder: Path, encoding: dict[str, str], band: str, terminal: bool
) -> None:
    code, text = spoken(["plan", "trace", *map(str, SMALL)], folder, encoding, terminal)
    assert code == 0, text
    assert band in text and "Traceback" not in text
    if encoding is ASCII:
        assert text.isascii()


@pytest.mark.parametrize("encoding", [ASCII, UTF8], ids=["C", "UTF-8"])
def test_a_name_of_bytes_that_are_no_text_is_said(folder: Path, encoding: dict[str, str]) -> None:
    code, text = spoken(["plan-show", b"no\xff\nsuch"], folder, encoding, False)
    assert code == 1
    assert text == "loadmaster: no\\udcff\\nsuch: no such plan file\n"


def spoken(
    arguments: list[str | bytes], folder: Path, encoding: dict[str, str], terminal: bool
) -> tuple[int, str]:
    """Exit code and all that a verb prints in a process of its own, on a terminal or a pipe."""
    env = {k: v for k, v in (os.environ | encoding).items() if v != ""}
    command = [sys.executable, "-m", "loadmaster.cli", *arguments]
    if not terminal:
        done = subprocess.run(command, capture_output=True, env=env, cwd=folder, check=False)
        return done.returncode, (done.stdout + done.stderr).decode()
    leader, follower = pty.openpty()
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=env, cwd=folder)
    os.close(follower)
    text = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:      # nobody has the other end any more
            break
        if not part:
            break
        text += part
    os.close(leader)
    return process.wait(60), text.decode()
