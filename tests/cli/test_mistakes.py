"""Users' mistakes at the command line: one line, the designed exit code, nothing left, no harm."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadmaster.placement.plan import Plan
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.synth.generate import synth_trace

from .test_cli import SMALL, Run, run

__all__ = ["run"]

SYNTH = ("trace", "synth", "--layers", 2, "--experts", 16, "--top-k", 2, "--tokens", 2000)
STEPS = ("--step-tokens", 128, "--concurrency", 16)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a trace, arrays, two plans, a file, a full folder and links that lead away."""
    save_trace(synth_trace(layers=2, experts=16, top_k=2, tokens=6000, request_tokens=50),
               tmp_path / "trace")
    ids = np.tile(np.arange(4).reshape(1, 2, 2), (600, 1, 1))
    np.savez(tmp_path / "ids.npz", ids=ids, num_experts=16)
    slots = np.arange(16).reshape(1, 4, 4).repeat(2, axis=0)
    Plan(slots=slots, num_experts=16).save(tmp_path / "plan.json")
    Plan(slots=slots[:1], num_experts=16).save(tmp_path / "other.json")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """Every path below and what it holds."""
    return {
        str(p.relative_to(folder)): "folder" if p.is_dir()
        else os.readlink(p) if p.is_symlink() else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize(("asked", "code", "said"), [
    (("plan", "trace", "-o", "link", *SMALL), 2, "link exists"),
    (("plan", "trace", "-o", "x" * 300, *SMALL), 1, "File name too long"),
    (("plan", "trace", "--num-experts", 8, *SMALL), 1, "holds 16 experts per layer, 8 were given"),
    (("plan", "trace", "--nodes", 10**9, *SMALL), 2, "at most 65536 devices"),
    (("plan", "trace", *SMALL, "--step-tokens", 10**20), 1, "do not fill one step"),
    ((*SYNTH, "-o", "new", "--domains", 10**20), 2, "--domains 100000000000000000000 in [1, "),
    ((*SYNTH, "-o", "new", "--seed", 10**20), 2, "--seed 100000000000000000000 must be"),
    (("trace", "import", "trace", "--key", "ids=x", "-o", "new"), 1, "leave --key out"),
    (("trace", "import", "ids.npz", "-o", "file"), 2, "file: exists already"),
    (("trace", "import", "ids.npz", "-o", "link"), 2, "link: exists already"),
    (("trace", "import", "ids.npz", "-o", "file/below"), 1, "file/below: "),
    (("trace", "import", "none.npz", "-o", "new", "--json"), 1, "none.npz: no such file"),
    (("trace", "import", "none.npz", "-o", "trace"), 2, "trace: exists already"),
    ((*SYNTH, "-o", "file/below"), 1, "is no folder"),
    ((*SYNTH, "-o", "y" * 300), 1, "File name too long"),
    ((*SYNTH, "-o", "new", "--layers", 0), 2, "--layers 0 must lie in"),
    ((*SYNTH, "-o", "new", "--layers", 10**11), 2, "--layers 100000000000 must lie in"),
    ((*SYNTH, "-o", "new", "--experts", 0), 2, "--experts 0 in [1, "),
    ((*SYNTH, "-o", "new", "--top-k", 0), 2, "--top-k 0 must lie in [1, 16]"),
    ((*SYNTH, "-o", "new", "--zipf", "nan"), 2, "--zipf nan"),
    ((*SYNTH, "-o", "new", "--zipf", "-1"), 2, "--zipf -1.0"),
    ((*SYNTH, "-o", "new", "--affinity", "nan"), 2, "--affinity nan"),
    ((*SYNTH, "-o", "new", "--switch-tokens", -5), 2, "--switch-tokens -5"),
    (("evaluate", "trace", "plan.json", "other.json", *STEPS), 1, "plan other has 1 layers"),
    (("evaluate", "trace", "plan.json", "--devices-per-node", 0, *STEPS), 2,
     "--devices-per-node 0"),
    (("evaluate", "trace", "plan.json", "--oversubscription", 0.5, *STEPS), 2,
     "--oversubscription 0.5 must be at least"),
])
def test_a_mistake_is_one_line_and_changes_nothing(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[object, ...], code: int,
    said: str,
) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    left, out, err = run(*asked)
    assert (left, out) == (code, "")
    assert said in err and len(err.strip().splitlines()) == 1
    assert contents(place) == before


@pytest.mark.parametrize("where", [
    "loadmaster.traces.synth.generate.synth_trace", "loadmaster.traces.storage.store.write_shard",
])
def test_an_interrupted_verb_says_so_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    code, out, err = run(*SYNTH, "-o", tmp_path / "new")
    assert (code, out) == (130, "")
    assert err == "loadmaster: interrupted; nothing half-written is left in place\n"
    assert not list(tmp_path.iterdir())


def test_an_interrupted_recording_keeps_its_whole_steps_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record_some(model: object, texts: object, out: Path, **_: object) -> None:
        out.mkdir()
        (out / "manifest.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("loadmaster.traces.recording.record_model.record_model", record_some)
    (tmp_path / "words.txt").write_text("words")
    code, out, err = run("trace", "record", "--model", tmp_path, "--text", tmp_path / "words.txt",
                         "-o", tmp_path / "new")
    assert (code, out) == (130, "")
    assert "new holds the whole steps recorded until then" in err


@pytest.mark.parametrize(
    "arguments",
    [("schema",), ("schema", "plan"), ("plan", "trace", *SMALL, "--json"),
     ("plan", "trace", *SMALL)],
    ids=["long JSON", "short JSON", "a plan's JSON", "a table"],
)
def test_a_reader_who_has_seen_enough_is_no_failure(
    arguments: tuple[object, ...], place: Path
) -> None:
    """As `loadmaster schema | head -1`: the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "loadmaster.cli", *map(str, arguments)],
                          stdout=writing, stderr=subprocess.PIPE, text=True, check=False, cwd=place)
    os.close(writing)
    assert (done.returncode, "Traceback" in done.stderr, "Exception" in done.stderr) == (
        0, False, False), done.stderr


def test_nobody_looking_at_the_progress_stops_no_work(place: Path) -> None:
    """As `loadmaster plan … 2>&1 | head -2`: the file that was asked for is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "loadmaster.cli", "plan", "trace", *map(str, SMALL), "--out",
         "p.json"],
        stdout=writing, stderr=writing, check=False, cwd=place,
    )
    os.close(writing)
    assert (place / "p.json").exists() == (done.returncode == 0)
    assert done.returncode == 0
