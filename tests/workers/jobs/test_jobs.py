"""Tasks and jobs on Ray: the same answers as at home, in the same order."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from loadmaster.errors import LoadmasterError, UsageError
from loadmaster.foundation.compiled import next_random, random_state, travelling_cache
from loadmaster.placement.plan import Plan
from loadmaster.workers.group import run_folder
from loadmaster.workers.jobs import submit as submitting
from loadmaster.workers.jobs.ray_executor import RayExecutor
from loadmaster.workers.jobs.submit import (
    _copy_package,
    _joining,
    _pack,
    follow,
    print_result,
    submit,
)


def slow_square(number: int) -> int:
    """Later items end first."""
    time.sleep(0.05 * (5 - number))
    return number * number


def fails_on_three(number: int) -> int:
    if number == 3:
        raise LoadmasterError("three")
    return number


def may_be_written(array: np.ndarray) -> bool:
    return array.flags.writeable


def test_results_come_in_order_and_errors_in_their_place(ray_cluster: None) -> None:
    executor = RayExecutor(cpus_per_task=0.1, ahead=3)
    assert list(executor.map(slow_square, range(5))) == [0, 1, 4, 9, 16]
    results = executor.map(fails_on_three, range(5))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LoadmasterError, match="three"):
        next(results)
    # Compiled code takes an array that may only be read as another type, and compiles again.
    assert list(executor.map(may_be_written, [np.arange(3)])) == [True]


# ---- jobs ----------------------------------------------------------------------------------


def test_the_package_travels_with_its_compiled_code(tmp_path: Path) -> None:
    """A copy of it, with other times of change, compiles nothing that is compiled here."""
    next_random(random_state(0))
    _copy_package(tmp_path / "loadmaster")
    for path in (tmp_path / "loadmaster").rglob("*.py"):
        os.utime(path, (1e9, 1e9))
    code = (
        "from loadmaster.foundation import compiled as c\n"
        "c.next_random(c.random_state(0))\n"
        "print(c.__file__, *c.next_random.stats.cache_misses.values())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    copy = tmp_path / "loadmaster" / "foundation" / "compiled.py"
    assert done.stdout == f"{copy}\n", done.stderr[-2000:]


def test_compiled_code_of_another_version_of_a_module_stays_behind(tmp_path: Path) -> None:
    source = tmp_path / "loops.py"
    source.write_text(
        "from loadmaster.foundation.compiled import compiled\n"
        "@compiled\n"
        "def doubled(x):\n"
        "    return 2 * x\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": ""}
    subprocess.run([sys.executable, "-c", "import loops; loops.doubled(1)"], cwd=tmp_path,
                   env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    assert {path.suffix for path in travelling_cache(source)} == {".nbi", ".nbc"}
    source.write_text(source.read_text().replace("2 * x", "3 * x"))
    assert travelling_cache(source) == ()


def test_inputs_travel_and_arguments_name_them_as_the_job_sees_them(tmp_path: Path) -> None:
    trace, plan = tmp_path / "trace", tmp_path / "plan.json"
    trace.mkdir()
    (trace / "manifest.json").write_text("{}")
    command = _pack(
        ["plan", str(trace), "--out", str(plan), "--seed", "3"], [trace], [plan], tmp_path / "work"
    )
    assert command == ["plan", "in/0/trace", "--out", "out/0-plan.json", "--seed", "3"]
    assert (tmp_path / "work/in/0/trace/manifest.json").read_text() == "{}"
    with pytest.raises(UsageError, match="no such file or folder to send"):
        _pack([], [tmp_path / "gone"], [], tmp_path / "other")


def test_paths_are_known_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "manifest.json").write_text("{}")
    command = _pack(
        ["plan", "./t", "t/", str(tmp_path / "t"), "t/manifest.json", "--out=./p.json", "--seed=3"],
        [Path("./t")], [Path("p.json")], tmp_path / "work",
    )
    assert command == [
        "plan", "in/0/t", "in/0/t", "in/0/t", "in/0/t/manifest.json", "--out=out/0-p.json",
        "--seed=3",
    ]


def test_a_verb_is_never_taken_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan").write_text("{}")
    assert _pack(["plan", "./plan"], [Path("plan")], [], Path("work")) == ["plan", "in/0/plan"]


def test_live_workers_of_a_job_join_its_cluster() -> None:
    assert _joining(["run", "--ranks", "2"]) == ["run", "--ranks", "2", "--address", "auto"]
    assert _joining(["apply", "p", "--address", "x:1"]) == ["apply", "p", "--address", "x:1"]
    assert _joining(["apply", "p", "--address=x:1"]) == ["apply", "p", "--address=x:1"]
    assert _joining(["plan", "t"]) == ["plan", "t"]


def test_a_result_without_a_folder_to_go_to_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no folder .*gone"):
        submit("http://127.0.0.1:1", ["plan"], outputs=[tmp_path / "gone" / "plan.json"])


class FakeStatus:
    def __init__(self, ended: bool) -> None:
        self.is_terminal = lambda: ended

    def __str__(self) -> str:
        return "RUNNING"


class FakeJobs:
    """A dashboard that plays a script: a log, an error, or a Ctrl-C at each look."""

    def __init__(self, script: list[str | BaseException]) -> None:
        self._script = script
        self.stopped = False

    def get_job_status(self, job: str) -> FakeStatus:
        last = len(self._script) == 1
        now = self._script[0] if last else self._script.pop(0)
        if isinstance(now, BaseException):
            raise now
        self._log = now
        return FakeStatus(last)

    def get_job_logs(self, job: str) -> str:
        return self._log

    def stop_job(self, job: str) -> None:
        self.stopped = True


def test_a_dashboard_that_stumbles_does_not_stop_the_job() -> None:
    lines: list[str] = []
    jobs = FakeJobs(["a\n", ConnectionError("gone"), RuntimeError("status code 502"), "a\nb\nc"])
    assert follow(jobs, "j", lines.append, poll_s=0.0) == "a\nb\nc"
    assert lines == ["a", "b", "c"] and not jobs.stopped


def test_a_dashboard_gone_for_long_leaves_the_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_SILENCE_S", 0.01)
    jobs = FakeJobs(["a\n", ConnectionError("gone")])
    with pytest.raises(LoadmasterError, match=r"job j goes on"):
        follow(jobs, "j", lambda line: None, poll_s=0.005)
    assert not jobs.stopped


def test_ctrl_c_stops_the_job_and_shows_how_it_ends() -> None:
    lines: list[str] = []
    jobs = FakeJobs(["a\n", KeyboardInterrupt(), "a\n", "a\nended\n"])
    with pytest.raises(KeyboardInterrupt):
        follow(jobs, "j", lines.append, poll_s=0.0)
    assert jobs.stopped
    assert lines == ["a", "stopping job j: it gets 30 s to end what it has started", "ended"]


def test_a_silent_job_is_said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_SAY_S", -1.0)
    lines: list[str] = []
    follow(FakeJobs(["", "", "end\n"]), "j", lines.append, poll_s=0.0)
    assert lines == ["job j: RUNNING, 0 s so far"] * 2 + ["end"]


def test_a_cluster_elsewhere_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match="token authentication only"):
        submit("http://10.0.0.7:8265", ["plan"])


def test_results_on_the_log_are_marked_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0-noise.bin").write_bytes(np.random.default_rng(0).bytes(200_000))
    print_result(3, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert all(line.startswith("LOADMASTER-RESULT ") for line in lines)
    assert lines[0].startswith("LOADMASTER-RESULT 3;")


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A Ray head of our own with a dashboard; ended by the pid of what we started."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    binary = Path(sys.executable).with_name("ray")
    path = f"{binary.parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"RAY_AUTH_MODE": "token", "PATH": path}
    process = subprocess.Popen(
        [str(binary), "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={agent}", "--dashboard-host=127.0.0.1",
         "--num-cpus=2", "--block", "--disable-usage-stats"],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """A free port outside the range that Ray gives its workers."""
    import socket

    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if not 10000 <= port < 20000:
            return port


def wait_for(address: str) -> None:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
            return
        except urllib.error.HTTPError:
            return      # 401: it is there, and asks for the token
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@pytest.mark.slow
def test_a_verb_runs_as_a_job_and_its_plan_comes_back(head: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    Plan(slots=np.arange(4).reshape(1, 2, 2), num_experts=4).save(plan)
    lines: list[str] = []
    result = submit(head, ["plan-show", str(plan)], inputs=[plan], on_line=lines.append)
    assert result.exit_code == 0, lines
    assert any("4" in line for line in lines)
    broken = submit(head, ["plan-show", str(tmp_path / "no.json")], on_line=lines.append)
    assert broken.exit_code == 1
    assert any("no such plan file" in line for line in lines)


@pytest.mark.slow
def test_a_group_in_a_job_runs_on_its_cluster_and_ends_with_it(
    head: str, checkpoint: Callable[[str], Path]
) -> None:
    model, name = checkpoint("qwen3_moe"), f"in-a-job-{os.getpid()}"
    lines: list[str] = []

    def until_it_serves(line: str) -> None:
        lines.append(line)
        if "serves" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(head, ["run", "--model", str(model), "--ranks", "1", "--name", name],
               inputs=[model], on_line=until_it_serves)
    said = "\n".join(lines)
    assert "Connecting to existing Ray cluster" in said or "Started a local" not in said
    assert "stopping job" in said and f"ending group {name!r}" in said, said


# ---- where groups leave their address ------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65, "two words"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a group"):
        run_folder.group_folder(name)


def test_an_address_is_found_again_until_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_folder.read_address("g") is None
    run_folder.write_address("g", "1.2.3.4:5")
    assert run_folder.read_address("g") == "1.2.3.4:5"
    run_folder.remove("g")
    assert run_folder.read_address("g") is None


def test_a_place_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_folder.group_folder("g").parent.chmod(0o777)
    with pytest.raises(LoadmasterError, match="not a folder of yours alone"):
        run_folder.group_folder("g")
