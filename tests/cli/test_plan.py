"""`loadmaster plan` beyond its first run: methods, phases, engines' dispatch, budgets of moves."""

import json
from pathlib import Path

import numpy as np
import pytest

from loadmaster.placement.plan import Plan
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.synth.generate import synth_trace
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
    for column in ("bound", "gap", "seconds", "replicas", "device transfers"):
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


@pytest.mark.parametrize("form", ["trace", "loads"])
def test_a_time_limit_already_past_still_gives_a_plan(
    run: Run, trace: Path, tmp_path: Path, form: str
) -> None:
    source, target = trace, tmp_path / "plan.json"
    if form == "loads":
        source = tmp_path / "loads.npz"
        np.savez(source, load=np.arange(1, 33).reshape(2, 16) * 10**11)
    code, out, _ = run("plan", source, "--time-limit", "1e-9", "-o", target, *SMALL)
    assert code == 0 and "time limit fired: auto" in " ".join(out.split())
    assert (Plan.load(target).replicas_LGE().sum(axis=1) >= 1).all()


def test_a_budget_of_moves_is_kept(run: Run, trace: Path, tmp_path: Path) -> None:
    old_plan, after = tmp_path / "current.json", tmp_path / "after.json"
    run("plan", trace, "--method", "round_robin", "-o", old_plan, *SMALL)
    code, out, _ = run(
        "plan", trace, "--current", old_plan, "--max-moves", 5, "-o", after, *SMALL
    )
    assert code == 0 and "rebalance" in out
    assert 0 < len(Plan.load(old_plan).moves_to(Plan.load(after))) <= 5


def test_a_budget_of_moves_counts_for_average_loads_too(run: Run, tmp_path: Path) -> None:
    loads, old_plan, after = (tmp_path / n for n in ("loads.npz", "current.json", "after.json"))
    rng = np.random.default_rng(0)
    np.savez(loads, load=rng.integers(100, 9000, (2, 16)))
    assert run("plan", loads, "--method", "contiguous", "-o", old_plan, *SMALL)[0] == 0
    code, out, _ = run(
        "plan", loads, "--current", old_plan, "--max-moves", 4, "-o", after, *SMALL
    )
    assert code == 0 and "4 experts move" in out
    assert len(Plan.load(old_plan).moves_to(Plan.load(after))) == 4


@pytest.mark.parametrize(("asked", "said"), [
    (("--max-moves", 3), "name it with --current"),
    (("--phase", "both"), "unknown --phase 'both'"),
    (("--method", "luck"), "unknown --method 'luck'"),
    (("--objective", "time"), "--model"),
])
def test_options_that_mean_nothing_end_with_2_and_one_line(
    run: Run, trace: Path, asked: tuple[object, ...], said: str
) -> None:
    code, _, err = run("plan", trace, *asked, *SMALL)
    assert code == 2
    assert said in err and len(err.strip().splitlines()) == 1


def test_a_method_that_cannot_is_a_line_of_the_table(run: Run, trace: Path, tmp_path: Path) -> None:
    place = tmp_path / "uneven.yaml"
    place.write_text("hardware: cpu\ndevices:\n" + "".join(
        f"- {{node: 0, slots: {slots}}}\n" for slots in (6, 6, 4, 4)))
    asked = ("--cluster", place, "--method", "eplb", "--method", "greedy", *SMALL[6:])
    code, out, _ = run("plan", trace, *asked)
    assert code == 0 and "cannot" in out and "note: eplb: cannot (EPLB needs equally many" in out
    code, out, _ = run("plan", trace, *asked, "--json")
    assert code == 0 and set(json.loads(out)["cannot"]) == {"eplb"}
    code, _, err = run("plan", trace, *asked[:4], *SMALL[6:])
    assert code == 3 and "EPLB needs" in err and len(err.strip().splitlines()) == 1


def test_moves_are_priced_and_told_in_order(run: Run, trace: Path, tmp_path: Path) -> None:
    old_plan, model = tmp_path / "current.json", tmp_path / "model.json"
    model.write_text(json.dumps({"num_layers": 2, "num_experts": 16, "top_k": 2, "hidden": 64,
                                 "intermediate": 64}))
    run("plan", trace, "--method", "round_robin", "-o", old_plan, *SMALL)
    asked = ("--current", old_plan, "--model", model, "--objective", "balance", *SMALL)
    code, out, _ = run("plan", trace, *asked, "--max-bytes", 4 * 24576)
    assert code == 0
    for said in ("moves, best gain first", "to device", "pays back after", "--horizon 10,000"):
        assert said in " ".join(out.split())      # wherever a line ends
    code, out, _ = run("plan", trace, *asked, "--max-moves", 3, "--json")
    row = next(r for r in json.loads(out)["rows"] if r["name"] == "rebalance")
    assert 0 < row["moves"] == len(row["ordered_moves"]) <= 3
    assert row["move_bytes"] == row["moves"] * 24576 and "pays_back_after_steps" in row
    assert json.loads(out)["metric"] == "imbalance_mean"      # the objective that was planned for


def test_the_active_plan_lends_its_slots_and_dispatch(run: Run, trace: Path, tmp_path: Path
                                                        ) -> None:
    old_plan, after = tmp_path / "current.json", tmp_path / "after.json"
    wide = [*SMALL[:4], "--slots-per-device", 7, *SMALL[6:]]
    run("plan", trace, "--method", "contiguous", "--dispatch", "vllm_hash", "-o", old_plan, *wide)
    code, out, _ = run("plan", trace, "--current", old_plan, "--method", "greedy", "-o", after,
                       *SMALL[:4], *SMALL[6:])
    assert code == 0, out
    assert Plan.load(after).dispatch.policy == "vllm_hash"
    assert Plan.load(after).slots_per_device == 7


@pytest.mark.parametrize(("asked", "code", "said"), [
    (("-o", "{tmp}/absent/p.json"), 2, "there is no folder"),
    (("--seed", -1), 2, "--seed -1 must be at least 0"),
    (("--model", "{tmp}/binary"), 1, "is not UTF-8; give a checkpoint's folder"),
    (("--model", "{tmp}/binary/below"), 1, "cannot be read: Not a directory"),
    (("--cluster", "{tmp}"), 1, "cannot be read: a folder, not a file"),
    (("--horizon", 0), 2, "--horizon 0.0 must be above 0"),
    (("--time-limit", 0), 2, "--time-limit 0.0 must be above 0"),
    (("--max-bytes", 5), 2, "--max-bytes counts moves away from a plan"),
])
def test_a_users_mistake_is_one_line_before_any_planning(
    run: Run, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    asked: tuple[object, ...], code: int, said: str,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("planned before looking")

    monkeypatch.setattr("loadmaster.placement.rebalancing.trial_plans.plan", never)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    asked = tuple(str(part).replace("{tmp}", str(tmp_path)) for part in asked)
    left, out, err = run("plan", trace, *SMALL, *asked)
    assert (left, out) == (code, "") and said in err and len(err.strip().splitlines()) == 1


def test_plans_apart_refuse_a_second_file_before_planning(
    run: Run, trace: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.decode.json").write_text("mine")
    code, _, err = run("plan", trace, "--phase", "apart", "-o", tmp_path / "p.json", *SMALL)
    assert code == 2 and "p.decode.json exists" in err
    assert not (tmp_path / "p.prefill.json").exists()


def test_average_loads_say_what_they_wrote_and_know_no_phase(run: Run, tmp_path: Path) -> None:
    loads, target = tmp_path / "loads.npz", tmp_path / "plan.json"
    np.savez(loads, load=np.random.default_rng(0).integers(100, 9000, (2, 16)))
    code, out, _ = run("plan", loads, "--method", "greedy", "-o", target, *SMALL)
    assert code == 0 and f"wrote greedy to {target}" in out.replace("\n", "")
    assert "note: planned for load only" in out
    code, _, err = run("plan", loads, "--phase", "decode", *SMALL)
    assert code == 2 and "do not tell prefill from decode" in err


def test_evaluate_refuses_a_plan_over_the_slots(run: Run, trace: Path, tmp_path: Path) -> None:
    held = np.full((2, 4, 5), -1)
    held[:, :, :4] = np.arange(16).reshape(4, 4)
    held[:, 0, 4] = 15
    Plan(slots=held, num_experts=16).save(tmp_path / "five.json")
    Plan(slots=held[:, :, :4], num_experts=16).save(tmp_path / "four.json")
    place = tmp_path / "four.yaml"
    place.write_text("hardware: cpu\ndevices_per_node: 4\nslots_per_device: 4\n")
    steps = ("--step-tokens", 128, "--concurrency", 16)
    code, _, err = run("evaluate", trace, tmp_path / "five.json", "--cluster", place, *steps)
    assert code == 1 and "plan five fills 5 slots of device 0" in err
    both = (tmp_path / "four.json", tmp_path / "five.json")
    assert run("evaluate", trace, *both, *steps)[0] == 0      # without a cluster: room for both


def test_an_import_looks_at_its_target_first(run: Run, tmp_path: Path) -> None:
    code, _, err = run("plan-import", tmp_path / "none.json", "--format", "vllm_ascend", "-o",
                       tmp_path / "absent" / "p.json")
    assert code == 2 and "there is no folder" in err


def test_routing_of_a_known_shape_is_offered_its_model(run: Run, tmp_path: Path) -> None:
    """24 layers of 32 experts, top-4: gpt-oss-20b's. With sizes there is nothing to offer."""
    save_trace(synth_trace(layers=24, experts=32, top_k=4, tokens=3000, request_tokens=50),
               tmp_path / "like-gpt-oss")
    asked = ("plan", tmp_path / "like-gpt-oss", "--method", "greedy", "--method", "contiguous",
             "--step-tokens", 128, "--concurrency", 16)
    _, out, _ = run(*asked)
    headline = " ".join(out.split("\n\n")[0].split())
    assert "this is balance, not time" in headline and "--model gpt-oss-20b" in headline
    document = json.loads(run(*asked, "--json", "--model", "gpt-oss-20b")[1])
    assert document["metric"] == "step_time_us" and "--model" not in document["verdict"]


def test_routing_like_nobody_elses_is_offered_nothing(run: Run, trace: Path) -> None:
    _, out, _ = run("plan", trace, "--method", "greedy", "--method", "contiguous", *SMALL)
    assert "balance, not time" in out and "--model" not in out.split("\n\n")[0]
