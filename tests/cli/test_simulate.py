"""`simulate`, `whatif`, `schema` of their files: verdicts are paired, mistakes are one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from loadmaster.placement.plan import DispatchSpec, Plan

from .test_cli import Run, run, trace

__all__ = ["run", "trace"]      # fixtures

LOAD = ("--requests", 30, "--rate", 200, "--prompt-tokens", 64, "--output-tokens", 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and three plans on 4 devices: hot experts spread, apart, all on one."""
    folder = tmp_path_factory.mktemp("simulate")
    (folder / "model.json").write_text(json.dumps(
        {"num_layers": 2, "num_experts": 16, "top_k": 2, "hidden": 2048, "intermediate": 1024}
    ))
    even = np.arange(16, dtype=np.int16).reshape(4, 4)
    for name, slots in (("rows", even), ("same", even), ("columns", even.T)):
        Plan(np.stack([slots, slots]), 16, dispatch=DispatchSpec(policy="even")).save(
            folder / f"{name}.json"
        )
    return folder


@pytest.fixture
def simulate(run: Run, trace: Path, place: Path):
    """Runs `simulate` on plans by name."""
    def call(*names: str, options: tuple[object, ...] = ()) -> tuple[int, str, str]:
        plans = [place / f"{name}.json" for name in names]
        return run("simulate", trace, *plans, "--model", place / "model.json", *LOAD, *options)

    return call


def one_line(err: str) -> str:
    """The error, which is one line and no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("loadmaster: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_equal_plans_are_indistinguishable_and_say_so(simulate) -> None:
    code, out, _ = simulate("rows", "same")
    assert code == 0
    assert "indistinguishable from it: same" in out.splitlines()[0]
    assert "paired" in out


def test_the_table_tells_who_waits_and_what_costs_the_time(simulate) -> None:
    code, out, _ = simulate("rows", "columns", options=("--slo-ttft-ms", 1e6))
    assert code == 0
    for said in ("% behind best", "where a step's time goes", "placement", "network",
                 "slowest device", "good requests/s", "of device", "requests/s within the limits"):
        assert said in " ".join(out.split()), said


def test_goodput_counts_requests_within_the_limits(simulate) -> None:
    code, out, _ = simulate("rows", options=("--slo-tpot-ms", 1e-6, "--json"))
    served = json.loads(out)["plans"]["rows"]
    assert code == 0 and 0 <= served["goodput_requests_per_s"] < served["requests_per_s"]
    assert served["slo"]["ttft_us"] is None, "no limit was named"


def test_json_is_paired_too(simulate) -> None:
    code, out, _ = simulate("rows", "columns", options=("--json",))
    document = json.loads(out)
    assert code == 0 and set(document["plans"]) == {"rows", "columns"}
    first, second = document["paired"]["rows"]
    assert first["best"] and first["behind_best_us"] == 0.0
    assert second["low_us"] <= second["behind_best_us"] <= second["high_us"]
    assert document["verdict"].startswith(first["name"])


def test_one_dispatch_for_all_plans(simulate) -> None:
    """Without replicas every policy sends a token to the one copy there is; counts cost time."""
    mean = {}
    for policy in ("even", "balanced"):
        _, out, _ = simulate("rows", options=("--dispatch", policy, "--json"))
        mean[policy] = json.loads(out)["plans"]["rows"]["blame"]["imbalance_mean"]
    assert mean["even"] == pytest.approx(mean["balanced"])
    code, _, err = simulate("rows", options=("--dispatch", "dice"))
    assert code == 2 and "balanced" in one_line(err)


def test_a_small_step_and_little_memory_make_requests_wait(simulate) -> None:
    waits = []
    for options in ((), ("--step-tokens", 32), ("--step-tokens", 32, "--max-requests", 1),
                    ("--kv-bytes-per-token", 2.5e8)):
        code, out, err = simulate("rows", options=(*options, "--rate", 5000, "--json"))
        assert code == 0, err
        waits.append(json.loads(out)["plans"]["rows"]["ttft_us"]["mean"])
    assert waits[0] < waits[1] < waits[2] and waits[3] > waits[0]


def test_faults_happen_and_are_told(simulate, tmp_path: Path) -> None:
    faults = tmp_path / "faults.yaml"
    faults.write_text("faults:\n- {kind: slow_device, device: 1, factor: 50}\n"
                      "- {kind: jitter, sigma: 0.2}\n- {kind: jitter, sigma: 0.3, devices: [0]}\n")
    well = json.loads(simulate("rows", options=("--json",))[1])["plans"]["rows"]
    code, out, _ = simulate("rows", options=("--json", "--faults", faults))
    hurt = json.loads(out)["plans"]["rows"]
    assert code == 0 and hurt["step_us"]["mean"] > 2 * well["step_us"]["mean"]
    assert [e["kind"] for e in hurt["events"]] == ["jitter", "jitter", "slow"]
    assert "what happened" in simulate("rows", options=("--faults", faults))[1]


def test_a_policy_looks_for_better_plans_while_serving(simulate) -> None:
    code, out, _ = simulate("rows", options=("--policy", "never", "--json"))
    assert code == 0 and json.loads(out)["plans"]["rows"]["events"] == []
    options = ("--policy", "every-n", "--every-steps", 20, "--requests", 60, "--output-tokens", 64,
               "--json")
    code, out, _ = simulate("rows", options=options)
    kinds = {e["kind"] for e in json.loads(out)["plans"]["rows"]["events"]}
    assert code == 0 and kinds & {"leave it", "apply"}


def test_files_are_written_whole(simulate, tmp_path: Path) -> None:
    page, timeline = tmp_path / "page.html", tmp_path / "steps.json"
    options = ("--report", page, "--trace-out", timeline, "--dispatch", "balanced")
    code, out, err = simulate("rows", "columns", options=options)
    assert code == 0, err
    assert out.splitlines()[0].split(";")[0] in page.read_text()
    assert json.loads(timeline.read_text())
    code, _, err = simulate("rows", options=("--report", page))
    assert code == 2 and "exists" in one_line(err)


@pytest.mark.parametrize(("options", "code", "said"), [
    (("--requests", 0), 2, "--requests 0"),
    (("--requests", -5), 2, "--requests -5"),
    (("--rate", 0), 2, "--rate 0"),
    (("--rate", "nan"), 2, "--rate nan"),
    (("--rate", 1e-300), 2, "raise the rate"),
    (("--prompt-tokens", -3), 2, "--prompt-tokens -3"),
    (("--output-tokens", "inf"), 2, "--output-tokens inf"),
    (("--slo-ttft-ms", "nan"), 2, "--slo-ttft-ms"),
    (("--report", "absent/page.html"), 2, "no folder absent"),
    (("--trace-out", "absent/steps.json"), 2, "no folder absent"),
    (("--report", "one.html", "--trace-out", "one.html"), 2, "named twice"),
    (("--step-tokens", 4, "--max-requests", 5), 2, "--max-requests 5"),
    (("--other-bytes", 5), 2, "--kv-bytes-per-token"),
    (("--policy", "luck"), 2, "net_benefit"),
    (("--overlap", "luck"), 2, "two_batch"),
    (("--faults", "absent.yaml"), 1, "no such faults file"),
    (("--devices-per-node", 3), 1, "the plan is for 4 devices"),
])
def test_a_mistake_is_one_line_before_anything_is_served(
    simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options, code: int, said: str
) -> None:
    def never(*_args: object, **_more: object) -> None:
        raise AssertionError("a plan served")

    monkeypatch.setattr("loadmaster.simulator.serving.compare_served.simulate", never)
    monkeypatch.chdir(tmp_path)
    got, _, err = simulate("rows", options=options)
    assert got == code and said in one_line(err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "said"), [
    ("faults: [{kind: slow_device, device: 9, factor: 2}]", "device 9: the cluster has devices"),
    ("faults: [{kind: jitter, sigma: 1, devices: [7]}]", "device 7"),
    ("faults: [{kind: lost_devices, at_us: 1, node: 3}]", "node 3"),
    ("faults: [{kind: slow_device, device: 0, factor: .nan}]", "slow_device.factor"),
    ("faults: [{kind: slow_device, device: 0, factor: 2, group: 1}]", "group 1"),
    ("faults: []", "at least one"),
    ("[", "not YAML"),
])
def test_a_bad_faults_file_is_named(simulate, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text(text)
    code, _, err = simulate("rows", options=("--faults", path))
    assert code == 1 and said in one_line(err) and str(path) in err


def test_a_plan_that_does_not_fit_is_named_before_the_first_serves(
    simulate, place: Path
) -> None:
    Plan(np.arange(16, dtype=np.int16).reshape(1, 2, 8).repeat(2, axis=0), 16).save(
        place / "two.json"
    )
    code, _, err = simulate("rows", "two")
    assert code == 1 and "plan two: " in one_line(err)


@pytest.fixture
def whatif(run: Run, trace: Path, place: Path, tmp_path: Path):
    """Runs `whatif` on a small grid."""
    grid = tmp_path / "grid.yaml"
    grid.write_text("base: {preset: cpu, devices_per_node: 4, slots_per_device: 4, "
                    "step_tokens: 64}\naxes: {method: [contiguous, round_robin]}\n")

    def call(*options: object) -> tuple[int, str, str]:
        return run("whatif", trace, grid, "--model", place / "model.json", *LOAD, *options)

    return call


def test_whatif_keeps_cells_and_tells_what_was_not_measured(whatif, tmp_path: Path) -> None:
    """64 tokens of 2048 values are more bytes than the CPU preset's exchange was measured with."""
    kept, table = tmp_path / "cells.jsonl", tmp_path / "table.csv"
    code, out, _ = whatif("--resume", kept, "--csv", table, "--prompt-tokens", 3000,
                          "--requests", 5)
    assert code == 0 and len(kept.read_text().splitlines()) == 2
    assert table.read_text().count("\n") == 3
    again = whatif("--resume", kept, "--prompt-tokens", 3000, "--requests", 5)
    assert again[:2] == (0, out), "a resumed study says the same, notes and all"


def test_extrapolation_is_said(run: Run, trace: Path, place: Path, tmp_path: Path) -> None:
    """Steps of 8,192 tokens pass the CPU preset's largest measured exchange."""
    grid = tmp_path / "grid.yaml"
    grid.write_text("base: {preset: cpu, devices_per_node: 4, slots_per_device: 4}\n")
    load = ("--requests", 5, "--rate", 1000, "--prompt-tokens", 8000, "--output-tokens", 2)
    code, out, _ = run("whatif", trace, grid, "--model", place / "model.json", *load)
    assert code == 0 and "more bytes per port than the exchange table measured" in out
    code, out, _ = run("simulate", trace, place / "rows.json", "--preset", "cpu", "--model",
                       place / "model.json", *load)
    assert code == 0 and "more bytes per port than the exchange table measured" in out


@pytest.mark.parametrize(("options", "code", "said"), [
    (("--csv", "absent/table.csv"), 2, "no folder absent"),
    (("--resume", "absent/cells.jsonl"), 2, "no folder absent"),
    (("--resume", "."), 2, "is a folder"),
    (("--resume", "mine.txt"), 1, "not a finished cell"),
    (("--resume", "x", "--csv", "x"), 2, "the same file"),
    (("--rank-by", "beauty"), 2, "latency_mean_us"),
    (("--rate", "nan"), 2, "--rate nan"),
])
def test_whatif_refuses_before_the_first_cell(
    whatif, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options, code: int, said: str
) -> None:
    def never(*_args: object) -> None:
        raise AssertionError("a cell ran")

    monkeypatch.setattr("loadmaster.simulator.whatif.run.run_cell", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    got, _, err = whatif(*options)
    assert got == code and said in one_line(err)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_grid_and_faults_have_schemas(run: Run) -> None:
    grid, faults = (json.loads(run("schema", name)[1]) for name in ("grid", "faults"))
    assert {"Scenario", "Fault"} <= set(grid["$defs"])
    assert {"SlowDeviceFields", "LostDevicesFields"} <= set(faults["$defs"])
    assert {"grid", "faults"} <= set(json.loads(run("schema")[1]))
