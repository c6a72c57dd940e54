"""The command line as a user meets it: verdict first, JSON for machines, errors in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loadmaster.cli.main import main
from loadmaster.placement.plan import Plan
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.synth.generate import synth_trace

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
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


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored trace of 2 layers x 16 experts, skewed."""
    folder = tmp_path_factory.mktemp("cli") / "trace"
    made = synth_trace(layers=2, experts=16, top_k=2, tokens=30_000, zipf=1.0, request_tokens=50)
    save_trace(made, folder)
    return folder


SMALL = ("--preset", "cpu", "--devices-per-node", 4, "--slots-per-device", 5,
         "--step-tokens", 128, "--concurrency", 16, "--effort", "fast")


def test_plan_says_its_verdict_first_and_writes_the_plan(run: Run, trace: Path, tmp_path: Path
                                                         ) -> None:
    target = tmp_path / "plan.json"
    code, out, _ = run("plan", trace, "--out", target, *SMALL)
    assert code == 0
    assert "contiguous" in out.splitlines()[0]
    assert "gap" in out and "* " in out
    assert Plan.load(target).num_devices == 4


def test_plan_as_json_is_one_document_on_stdout(run: Run, trace: Path) -> None:
    code, out, _ = run("plan", trace, "--json", *SMALL)
    document = json.loads(out)
    assert code == 0
    assert document["verdict"] and document["chosen"]
    assert {"name", "bound", "gap", "seconds", "chosen"} <= set(document["rows"][0])


def test_the_same_plan_twice_is_the_same_file(run: Run, trace: Path, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        assert run("plan", trace, "--out", tmp_path / name, *SMALL)[0] == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_plan_does_not_write_over_a_file(run: Run, trace: Path, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    target.write_text("mine")
    code, _, err = run("plan", trace, "--out", target, *SMALL)
    assert code == 2 and "exists" in err
    assert target.read_text() == "mine"


def test_a_cluster_too_small_is_infeasible(run: Run, trace: Path) -> None:
    code, _, err = run("plan", trace, "--devices-per-node", 2, "--slots-per-device", 5)
    assert code == 3
    assert "16 experts" in err and len(err.strip().splitlines()) == 1


def test_plan_and_evaluate_know_oversubscription(
    run: Run, trace: Path, tmp_path: Path
) -> None:
    """A narrow spine between two nodes costs time, and only there."""
    model = tmp_path / "model.json"
    spec = {"name": "m", "num_layers": 2, "num_experts": 16, "top_k": 2, "hidden": 4096,
            "intermediate": 512}
    model.write_text(json.dumps(spec))
    plan = tmp_path / "plan.json"
    assert run("plan", trace, "--out", plan, "--method", "eplb", "--oversubscription", 8,
               "--nodes", 2, "--devices-per-node", 2, "--step-tokens", 128)[0] == 0
    def step_us(*asked: object) -> float:
        code, out, err = run("evaluate", trace, plan, "--model", model, "--step-tokens", 128,
                             "--concurrency", 16, "--json", *asked)
        assert code == 0, err
        (row,) = json.loads(out)["rows"]
        return float(row["step_time_us"])

    two_nodes = ("--nodes", 2, "--devices-per-node", 2)
    assert step_us(*two_nodes, "--oversubscription", 8) > step_us(*two_nodes)
    assert step_us("--oversubscription", 8) == step_us()


def test_evaluate_leaves_with_4_when_the_first_plan_is_worse(run: Run, trace: Path, tmp_path: Path
                                                             ) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    assert run("plan", trace, "--method", "auto", "--out", good, *SMALL)[0] == 0
    slots = np.arange(16, dtype=np.int16).reshape(1, 4, 4).repeat(2, axis=0)
    Plan(slots=slots, num_experts=16).save(bad)
    options = ("--preset", "cpu", "--step-tokens", 128, "--concurrency", 16, "--json")
    code, out, _ = run("evaluate", trace, bad, "--current", good, *options)
    assert code == 4
    assert json.loads(out)["reference"] == "good"
    assert run("evaluate", trace, good, "--current", bad, *options)[0] == 0


def test_trace_verbs_make_import_and_describe(run: Run, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert run("trace", "synth", "--out", made, "--layers", 2, "--experts", 8, "--top-k", 2,
               "--tokens", 5000)[0] == 0
    code, out, _ = run("trace", "info", made, "--json")
    assert code == 0 and json.loads(out)["tokens"] == 5000
    ids = np.random.default_rng(0).random((600, 2, 8)).argsort(axis=2)[:, :, :2]
    np.savez(tmp_path / "ids.npz", ids=ids, request=np.arange(600) // 20)
    imported = tmp_path / "imported"
    code, out, _ = run("trace", "import", tmp_path / "ids.npz", "--num-experts", 8, "--out",
                       imported, "--json")
    assert code == 0 and json.loads(out)["tokens"] == 600
    assert run("trace", "info", imported)[0] == 0


@pytest.mark.parametrize("verb", [("plan",), ("trace", "info")])
def test_a_trace_that_is_not_there_is_one_line(run: Run, tmp_path: Path, verb: tuple[str, ...]
                                               ) -> None:
    code, out, err = run(*verb, tmp_path / "absent")
    assert code == 1 and out == ""
    assert err.startswith("loadmaster: ") and len(err.strip().splitlines()) == 1


def test_unknown_names_say_which_there_are(run: Run, trace: Path) -> None:
    for option, value, known in (
        ("--method", "magic", "auto"), ("--dispatch", "magic", "balanced"),
        ("--traffic", "magic", "per_node"), ("--preset", "magic", "h100"),
        ("--effort", "magic", "normal"), ("--phase", "magic", "prefill"),
    ):
        options = [o for o in SMALL if o not in ("--preset", "cpu", "--effort", "fast")]
        code, _, err = run("plan", trace, *options, option, value)
        assert code == 2 and known in err, (option, err)


def test_a_truncated_shard_is_refused(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    save_trace(synth_trace(layers=2, experts=8, top_k=2, tokens=3000), folder)
    shard = next(folder.rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-50])
    code, _, err = run("trace", "info", folder)
    assert code == 1 and shard.name in err


def test_a_manifest_of_a_newer_version_is_refused(run: Run, trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "newer"
    folder.mkdir()
    manifest = json.loads((trace / "manifest.json").read_text())
    key = next(k for k in manifest if "version" in k)
    (folder / "manifest.json").write_text(json.dumps(manifest | {key: 99}))
    code, _, err = run("trace", "info", folder)
    assert code == 1 and "99" in err and "upgrade" in err.lower()


def test_schema_prints_every_format(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert set(json.loads(out)) >= {"plan", "cluster", "model", "trace", "hardware"}
    assert run("schema", "nothing")[0] == 2


def test_plan_show_and_plan_diff(run: Run, trace: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert run("plan", trace, "--method", "auto", "--out", a, *SMALL)[0] == 0
    slots = np.arange(16, dtype=np.int16).reshape(1, 4, 4).repeat(2, axis=0)
    Plan(slots=slots, num_experts=16).save(b)
    code, out, _ = run("plan-show", a)
    assert code == 0 and "replicas" in out
    code, out, _ = run("plan-diff", a, b, "--json")
    assert code == 0 and json.loads(out)
    code, _, err = run("plan-show", tmp_path / "absent.json")
    assert code == 1 and "no such plan" in err


def test_the_version_is_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "loadmaster.cli", "--version"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.startswith("loadmaster ")


def test_plans_go_to_an_engine_and_back(run: Run, tmp_path: Path) -> None:
    """Refused with the nearest plan named; written with --nearest; read back with its shape."""
    plan, engine, back = (tmp_path / name for name in ("plan.json", "map.json", "back.json"))
    Plan(slots=np.array([[[0, 1, -1], [2, 3, 0]]], np.int16), num_experts=4).save(plan)
    code, _, err = run("plan-export", plan, "--format", "vllm_ascend", "--out", engine)
    assert code == 1 and "Nearest plan" in err and len(err.strip().splitlines()) == 1
    code, out, _ = run("plan-export", plan, "--format", "vllm_ascend", "--out", engine,
                       "--nearest", "--json")
    assert code == 0 and json.loads(out)["file"] == str(engine)
    code, out, _ = run("plan-import", engine, "--format", "vllm_ascend", "--out", back)
    assert code == 0 and "1 layers x 4 experts on 2 devices" in out
    code, out, _ = run("plan-diff", plan, back)
    assert code == 0 and out.startswith("nothing moves")
