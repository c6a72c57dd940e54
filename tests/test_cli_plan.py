"""`loadmaster plan` beyond its first run: methods, phases, engines' dispatch, budgets of moves."""

import json
from pathlib import Path

import numpy as np
import pytest

from loadmaster.placement.plan import Plan
from loadmaster.traces.store import save_trace
from loadmaster.traces.synth import synth_trace
from loadmaster.traces.trace import RoutingTrace

from .test_cli import SMALL, Run, run, trace

__all__ = ["run", "trace"]      # fixtures


def test_methods_named_are_the_ones_tried(run: Run, trace: Path) -> None:
    asked = [part for name in ("greedy", "affinity", "moetuner") for part in ("--method", name)]
    code, out, _ = run("plan", trace, "--json", *asked, *SMALL)
    assert code == 0
    assert {row["name"] for row in json.loads(out)["rows"]} == {"greedy", "affinity", "moetuner"}


def test_the_table_shows_bound_gap_and_seconds(run: Run, trace: Path) -> None:
    _, out, _ = run("plan", trace, *SMALL)
    for column in ("bound", "gap", "seconds", "replicas", "device copies"):
        assert column in out
    assert "judged on" in out and "no plan can be better" in out


@pytest.mark.parametrize("dispatch", ["sglang_static", "vllm_hash", "trtllm_round_robin"])
def test_a_plan_is_made_for_an_engines_dispatch(
    run: Run, trace: Path, tmp_path: Path, dispatch: str
) -> None:
    target = tmp_path / "plan.json"
    code, _, _ = run("plan", trace, "--dispatch", dispatch, "-o", target, *SMALL)
    assert code == 0
    assert Plan.load(target).dispatch.policy == dispatch


def test_prefill_and_decode_are_planned_apart(run: Run, trace: Path, tmp_path: Path) -> None:
    code, out, _ = run("plan", trace, "--phase", "apart", "-o", tmp_path / "p.json", *SMALL)
    assert code == 0
    assert out.startswith("prefill: ") and "\ndecode: " in out
    for phase in ("prefill", "decode"):
        assert Plan.load(tmp_path / f"p.{phase}.json").num_experts == 16


def test_a_trace_without_phases_is_not_planned_apart(run: Run, tmp_path: Path) -> None:
    made = synth_trace(layers=1, experts=8, top_k=2, tokens=2000)
    save_trace(RoutingTrace.from_arrays(made.ids, num_experts=8), tmp_path / "plain")
    code, _, err = run("plan", tmp_path / "plain", "--phase", "apart", *SMALL)
    assert code == 2
    assert "does not tell prefill from decode" in err and "--phase all" in err


def test_a_budget_of_moves_is_kept(run: Run, trace: Path, tmp_path: Path) -> None:
    standing, after = tmp_path / "standing.json", tmp_path / "after.json"
    run("plan", trace, "--method", "round_robin", "-o", standing, *SMALL)
    code, out, _ = run(
        "plan", trace, "--current", standing, "--max-moves", 5, "-o", after, *SMALL
    )
    assert code == 0 and "rebalance" in out
    assert 0 < len(Plan.load(standing).moves_to(Plan.load(after))) <= 5


def test_a_budget_of_moves_counts_for_average_loads_too(run: Run, tmp_path: Path) -> None:
    loads, standing, after = (tmp_path / n for n in ("loads.npz", "standing.json", "after.json"))
    rng = np.random.default_rng(0)
    np.savez(loads, load=rng.integers(100, 9000, (2, 16)))
    assert run("plan", loads, "--method", "contiguous", "-o", standing, *SMALL)[0] == 0
    code, out, _ = run(
        "plan", loads, "--current", standing, "--max-moves", 4, "-o", after, *SMALL
    )
    assert code == 0 and "4 experts move" in out
    assert len(Plan.load(standing).moves_to(Plan.load(after))) == 4


@pytest.mark.parametrize(("asked", "said"), [
    (("--max-moves", 3), "name it with --current"),
    (("--phase", "both"), "unknown phase 'both'"),
    (("--method", "luck"), "unknown method 'luck'"),
    (("--objective", "time"), "--model"),
])
def test_options_that_mean_nothing_end_with_2_and_one_line(
    run: Run, trace: Path, asked: tuple[object, ...], said: str
) -> None:
    code, _, err = run("plan", trace, *asked, *SMALL)
    assert code == 2
    assert said in err and len(err.strip().splitlines()) == 1
