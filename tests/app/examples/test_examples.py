"""Every example is run by the verb that reads such files, as a person would."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from loadmaster.app.examples import KINDS, example, usage
from loadmaster.app.inputs import read_model
from loadmaster.errors import UsageError
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.synth.generate import synth_trace
from tests.cli.test_cli import Run, run

__all__ = ["run"]      # a fixture

LOAD = ("--requests", 20, "--rate", 200, "--prompt-tokens", 64, "--output-tokens", 8)
STEPS = ("--step-tokens", 128, "--concurrency", 16, "--effort", "fast")


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the example model's layers, experts and top-k."""
    made = tmp_path_factory.mktemp("traces") / "trace"
    spec = read_model(write("model", made.parent))
    assert spec is not None
    save_trace(synth_trace(layers=spec.num_layers, experts=spec.num_experts, top_k=spec.top_k,
                           tokens=4000, request_tokens=50), made)
    return made


def write(kind: str, folder: Path) -> Path:
    path = folder / KINDS[kind][0]
    path.write_text(example(kind))
    return path


@pytest.fixture
def written(run: Run, tmp_path: Path) -> dict[str, Path]:
    """All kinds, written by the verb."""
    found = {}
    for kind, (name, _) in KINDS.items():
        found[kind] = tmp_path / name
        code, out, err = run("example", kind, found[kind])
        assert code == 0, err
        assert usage(kind, name).partition(" {")[0].split()[1] in out
    return found


def test_a_model_and_a_cluster_are_planned_for(
    run: Run, written: dict[str, Path], traces: Path
) -> None:
    code, out, err = run("plan", traces, "--model", written["model"], *STEPS)
    assert code == 0, err
    code, out, err = run("plan", traces, "--cluster", written["cluster"], *STEPS)
    assert code == 0 and "node transfers" in out, err


def test_a_grid_is_swept(run: Run, written: dict[str, Path], traces: Path) -> None:
    code, out, err = run("whatif", traces, written["grid"], "--model", written["model"], *LOAD)
    assert code == 0, err
    assert "failed" not in out and "slow" in out and "eplb" in out


def test_faults_befall_a_service(
    run: Run, written: dict[str, Path], traces: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert run("plan", traces, "--out", plan, *STEPS)[0] == 0
    code, out, err = run("simulate", traces, plan, "--model", written["model"], "--faults",
                         written["faults"], *LOAD)
    assert code == 0 and "jitter" in out, err


def test_an_example_is_printed_as_it_would_be_written(run: Run) -> None:
    for kind in KINDS:
        assert run("example", kind)[:2] == (0, example(kind))


def test_the_readme_uses_no_plan_grid_or_fault_file_that_no_line_before_it_makes() -> None:
    text = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    lines = [line for block in text.split("```sh\n")[1:]
             for line in block.partition("```")[0].splitlines()]
    made: set[str] = set()
    for line in lines:
        words = line.partition(" #")[0].split()
        files = {word for word in words if word.endswith((".json", ".yaml"))}
        new = {after for word, after in pairwise(words) if word in ("--out", "-o")}
        new |= {words[3]} if words[1:2] == ["example"] else set()
        assert files - new <= made, line
        made |= new
    assert {"plan.json", "grid.yaml", "faults.yaml"} <= made


def test_nothing_is_written_over_and_an_unknown_kind_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    code, _, err = run("example", "grid", tmp_path / "mine")
    assert code == 2 and "exists" in err and (tmp_path / "mine").read_text() == "mine"
    code, _, err = run("example", "plan")
    assert code == 2 and "grid, faults, cluster, model" in err
    with pytest.raises(UsageError, match="no example"):
        example("plan")
