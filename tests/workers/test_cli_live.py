"""`run`, `apply` and `submit` as a user meets them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.cli.apply import switch_outcome
from loadmaster.cli.main import main
from loadmaster.cli.progress import PlainProgress
from loadmaster.errors import LoadmasterError
from loadmaster.placement.plan import Plan, PlanError
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.recording.recorder import RecordingSummary
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.workers.control.supervise import (
    capacity_report,
    recording_report,
    roomy_cluster,
    watch,
)
from loadmaster.workers.control.switch_preview import advise, asked_for
from loadmaster.workers.coordinator.step_log import Measurements
from loadmaster.workers.protocol.phase_plans import PhasePlans

Run = Callable[..., tuple[int, str, str]]
SPEC = ModelSpec(num_layers=2, num_experts=4, top_k=2, hidden=64, intermediate=32)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["loadmaster", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        text = capfd.readouterr()
        return code, text.out, text.err

    return call


def plan_of(order: list[int]) -> Plan:
    """Two ranks with two experts each, in both layers."""
    slots = np.broadcast_to(np.array(order).reshape(2, 2), (2, 2, 2))
    return Plan(slots=slots.copy(), num_experts=4)


def status_of(plan: Plan, decode: Plan | None = None) -> dict[str, Any]:
    return {"plan": plan, "decode_plan": decode or plan, "epoch": 3, "step": 0,
            "model_spec": SPEC, "switching": False, "broken": ""}


# ---- run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "said"), [
    (("--ranks", 0), "at least one rank"),
    (("--ranks", -2), "at least one rank"),
    (("--ranks", 2, "--capacity-rule", "drop"), "go together"),
    (("--ranks", 2, "--capacity-rule", "x", "--capacity-factor", 1.0), "drop or reroute"),
    (("--ranks", 2, "--control", "often"), "never, every-n, drift, net-benefit"),
    (("--ranks", 2, "--control-dry-run"), "--control"),
    (("--ranks", 2, "--control", "never", "--control-window", 0), "at least 1"),
    (("--ranks", 2, "--control", "never", "--gpus-per-rank", 1), "--gpus-per-rank"),
])
def test_options_that_mean_nothing_are_one_line(
    verb: Run, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    code, _, err = verb("run", "--model", tmp_path, *options)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_a_broken_group_ends_the_watch_with_its_reason() -> None:
    class Broken:
        def __init__(self) -> None:
            self._reasons = iter(["", "", "rank 1 is gone for good"])

        def status(self) -> dict[str, Any]:
            return {"broken": next(self._reasons)}

    with pytest.raises(LoadmasterError, match="rank 1 is gone for good"):
        watch(Broken(), poll_s=0.0)


def test_trouble_is_told_once_while_the_group_serves_on() -> None:
    troubles = iter(["", "t: cannot be written", "t: cannot be written", "", "", "disk full"])

    class Troubled:
        def status(self) -> dict[str, Any]:
            found = next(troubles, None)
            return {"broken": "" if found is not None else "ended", "recording": True,
                    "recording_trouble": found or ""}

    told: list[str] = []
    with pytest.raises(LoadmasterError, match="ended"):
        watch(Troubled(), poll_s=0.0, on_trouble=told.append)
    assert told == ["recording: t: cannot be written", "recording: can be written again",
                    "recording: disk full"]


def test_a_group_says_what_its_recording_lost() -> None:
    parts = [
        RecordingSummary(100, 2, 0, 0, 0, None),
        RecordingSummary(60, 2, 0, 0, 40, "disk full"),
    ]
    assert recording_report(parts) == "recorded 160 tokens on 2 ranks; lost 40 (disk full)"
    assert recording_report([]) == ""


def test_a_capacity_rule_is_reported_by_share_and_peak() -> None:
    tokens = np.array([[[6, 2], [4, 4]]])       # one step, two layers, two ranks
    dropped = np.array([[[2, 0], [0, 0]]])
    nothing = np.zeros((1, 2))
    steps = Measurements(
        step=np.array([1]), epoch=np.array([1]), rows=nothing.astype(int), expert_cpu_us=tokens,
        tokens=tokens, remote_transfers=tokens, dropped=dropped, peak=np.array([[5, 4]]),
        step_wall_us=np.zeros(1), step_cpu_us=nothing, stage_us=nothing, staging=np.zeros(1, bool),
    )
    said = capacity_report(steps, SPEC)
    assert "dropped 11.11%" in said and "2.00 x the mean" in said


def test_a_controller_plans_for_the_groups_ranks_with_room() -> None:
    cluster = roomy_cluster(status_of(plan_of([0, 1, 2, 3])), None)
    assert cluster.num_devices == 2 and set(cluster.slots_G.tolist()) == {3}
    with pytest.raises(LoadmasterError, match="at least 2 are needed"):
        roomy_cluster(status_of(plan_of([0, 1, 2, 3])), 1)


# ---- apply -----------------------------------------------------------------------------------


def test_advice_lists_each_move_with_its_bytes_and_judges_by_time() -> None:
    trace = synth_trace(layers=2, experts=4, top_k=2, tokens=20_000, zipf=1.0, request_tokens=50)
    advice = advise(
        status_of(plan_of([0, 1, 2, 3])), PhasePlans.both(plan_of([0, 2, 1, 3])), trace
    )
    assert advice.moves == ((0, 0, 2), (0, 1, 1), (1, 0, 2), (1, 1, 1))
    each = int(SPEC.bytes_per_expert_E()[0])
    assert advice.move_bytes == (each,) * 4 and advice.move_us > 0
    assert advice.tables["all steps"].metric_name == "step_time_us"
    told = advice.to_dict()
    assert told["moved"][0] == {"layer": 0, "device": 0, "expert": 2, "bytes": each}
    json.dumps({k: v for k, v in told.items() if k != "judged"})


def test_advice_refuses_what_apply_would_refuse() -> None:
    three = Plan(slots=np.arange(6).reshape(1, 3, 2).repeat(2, 0) % 4, num_experts=4)
    with pytest.raises(PlanError, match="on 3 devices"):
        advise(status_of(plan_of([0, 1, 2, 3])), PhasePlans.both(three), None)


def test_an_active_decode_plan_is_kept_unless_another_is_named() -> None:
    first, second, third = plan_of([0, 1, 2, 3]), plan_of([0, 2, 1, 3]), plan_of([3, 1, 2, 0])
    apart = PhasePlans(first, second)
    assert asked_for(apart, third, None) == PhasePlans(third, second)
    assert asked_for(apart, third, third) == PhasePlans(third, third)
    assert asked_for(PhasePlans.both(first), third, None) == PhasePlans(third, third)


def test_what_an_interrupted_switch_became_is_said_truthfully() -> None:
    status = status_of(plan_of([0, 1, 2, 3]))
    assert "no switch is under way" in switch_outcome(status, 3)
    assert "goes on with the switch" in switch_outcome(status | {"switching": True}, 3)
    assert "the switch is done: epoch 4" in switch_outcome(status | {"epoch": 4}, 3)


# ---- progress --------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    text = io.StringIO()
    with PlainProgress(every_s=1e9, file=text) as bar:
        task = bar.add_task("planning", total=100)
        for done in range(100):
            bar.update(task, completed=done)
        bar.update(task, description="judging")
        bar.advance(task)
    assert text.getvalue() == "planning 0/100 (0 s)\njudging 99/100 (0 s)\n"


# ---- with live ranks ---------------------------------------------------------------------------

# Serves until the controller has twice judged a window; then says where every expert could go.
LOAD = """
import dataclasses, json, sys
from pathlib import Path
from loadmaster.workers.group.group import Group
group, log = Group.find(sys.argv[1]), Path(sys.argv[2])
judged = 0
while judged < 2:
    group.generate([[1 + i, 7, 9, i] * 12 for i in range(24)], 4)
    whole = log.read_text().rpartition("\\n")[0] if log.exists() else ""
    lines = map(json.loads, whole.splitlines())
    judged = sum(line["numbers"].get("steps", 0) > 0 for line in lines)
plan = group.plan
dataclasses.replace(plan, slots=plan.slots[:, ::-1].copy()).save(sys.argv[3])
"""
KILL = """
import sys, ray
from loadmaster.workers.group.group import Group
ray.kill(Group.find(sys.argv[1])._line._actor, no_restart=True)
"""


def call(*arguments: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "loadmaster.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=240,
    )
    assert code is None or done.returncode == code, done.stderr
    return done


def script(text: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-c", text, *map(str, arguments)], check=True, timeout=240)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `loadmaster run` in a process of its own; ended, if need be, by its pid."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "loadmaster.cli", "run", *map(str, options)],
            stdout=subprocess.PIPE, stderr=(tmp_path / "err").open("w"), text=True, cwd=tmp_path,
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "serves" in line, (tmp_path / "err").read_text()
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@pytest.mark.slow
def test_a_group_is_run_controlled_applied_to_and_ended(
    serving: Callable[..., subprocess.Popen[str]], checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    name = f"cli-{os.getpid()}"
    process = serving(
        "--model", checkpoint("qwen3_moe"), "--ranks", 2, "--name", name,
        "--capacity-rule", "drop", "--capacity-factor", 1.2, "--record-to", tmp_path / "trace",
        "--control", "net-benefit", "--control-dry-run", "--control-every", 4,
        "--control-window", 8, "--out", tmp_path / "folder",
    )
    shuffled = tmp_path / "plan.json"       # every expert on another rank than it is on now
    script(LOAD, name, tmp_path / "folder" / "control.jsonl", shuffled)
    told = json.loads(call("apply", shuffled, "--name", name, "--dry-run", "--json").stdout)
    assert told["applied"] is False and told["moves"] == len(told["moved"]) > 0
    assert told["judged"] and told["epoch"] == 1
    text = call("apply", shuffled, "--name", name, "--dry-run").stdout
    assert "would move" in text and "layer 0" in text
    done = json.loads(call("apply", shuffled, "--name", name, "--json").stdout)
    assert done["epoch"] == 2 and done["moves"] == told["moves"]
    assert done["move_bytes"] == told["move_bytes"]
    other = tmp_path / "other.json"
    Plan(slots=np.arange(4).reshape(1, 2, 2), num_experts=4).save(other)
    refused = [call("apply", other, "--name", name, *dry, code=1).stderr.splitlines()[-1]
               for dry in ((), ("--dry-run",))]
    assert refused[0] == refused[1] and "plan for it" in refused[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0
    err = (tmp_path / "err").read_text()
    assert "capacity rule, last" in err and "lost 0" in err
    lines = [json.loads(x) for x in (tmp_path / "folder/control.jsonl").read_text().splitlines()]
    assert lines and all(f"step {x['step']}: {x['answer']}" in err for x in lines)
    assert any(x["numbers"].get("steps", 0) > 0 for x in lines)
    assert call("apply", other, "--name", name, code=2).stderr.startswith("loadmaster: no group")


@pytest.mark.slow
def test_a_group_that_dies_ends_the_verb_with_the_reason(
    serving: Callable[..., subprocess.Popen[str]], checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    name = f"cli-dead-{os.getpid()}"
    process = serving("--model", checkpoint("qwen3_moe"), "--ranks", 2, "--name", name)
    script(KILL, name)
    began = time.monotonic()
    assert process.wait(60) == 1
    assert time.monotonic() - began < 45.0
    assert "is dead and will not come back" in (tmp_path / "err").read_text()
