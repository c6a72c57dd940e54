"""`replay` and `cache`: recorded steps under plans, and experts that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from loadmaster.placement.plan import DispatchSpec, Plan

from .test_cli import Run, run, trace
from .test_simulate import one_line, place

__all__ = ["place", "run", "trace"]      # fixtures

STEPS = ("--step-tokens", 128, "--concurrency", 16)


@pytest.fixture
def replay(run: Run, trace: Path, place: Path):
    """Runs `replay` on plans by name."""
    def call(*names: str, options: tuple[object, ...] = ()) -> tuple[int, str, str]:
        plans = [place / f"{name}.json" for name in names]
        return run("replay", trace, *plans, "--model", place / "model.json", *STEPS, *options)

    return call


def test_the_same_steps_are_compared_step_by_step(replay) -> None:
    code, out, _ = replay("rows", "columns", "same", options=("--json",))
    document = json.loads(out)
    assert code == 0 and document["verdict"] == document["comparison"]["verdict"]
    plans = document["plans"]
    assert plans["rows"]["total_us"] == plans["same"]["total_us"] != plans["columns"]["total_us"]
    rows = {row["name"]: row for row in document["comparison"]["rows"]}
    assert rows["same"]["change_percent"] == 0.0
    for name in plans:
        assert rows[name]["step_time_us"] == pytest.approx(plans[name]["step_us"]["mean"])


def test_the_table_tells_times_and_what_costs_them(replay) -> None:
    code, out, _ = replay("rows", "same")
    assert code == 0 and "cannot be told apart" in out.splitlines()[0]
    for said in ("% vs rows", "request mean", "where a step's time goes", "slowest device"):
        assert said in out, said


def test_the_verdict_is_about_the_active_plan(replay, place: Path) -> None:
    code, out, _ = replay("rows", options=("--current", place / "columns.json", "--json"))
    assert code == 0 and json.loads(out)["comparison"]["reference"] == "columns"
    code, out, _ = replay("rows", options=("--current", place / "rows.json", "--json"))
    assert code == 0 and json.loads(out)["comparison"]["reference"] == "current"


def test_requests_wait_for_their_arrival(replay, tmp_path: Path) -> None:
    """All within a second: the clock ends after the last arrival."""
    came = tmp_path / "came.jsonl"
    came.write_text("".join(
        json.dumps({"timestamp": n, "input_length": 1, "output_length": 1}) + "\n"
        for n in range(700)
    ))
    options = ("--max-steps", 5, "--json")
    plain = json.loads(replay("rows", options=options)[1])["plans"]["rows"]
    code, out, _ = replay("rows", options=(*options, "--arrivals", came))
    waited = json.loads(out)["plans"]["rows"]
    assert code == 0 and waited["total_us"] > plain["total_us"]
    came.write_text(came.read_text().splitlines()[0] + "\n")
    code, _, err = replay("rows", options=("--arrivals", came))
    assert code == 1 and "each request needs one" in one_line(err)


@pytest.mark.parametrize(("options", "code", "said"), [
    (("--max-steps", 0), 2, "--max-steps 0"),
    (("--order", "luck"), 2, "unknown --order 'luck'; there are: interleaved"),
    (("--dispatch", "dice"), 2, "balanced"),
    (("--overlap", "luck"), 2, "pipeline"),
    (("--step-tokens", 0), 2, "tokens"),
    (("--step-tokens", 10**9), 1, "do not fill one step"),
    (("--current", "absent.json"), 1, "no such plan"),
    (("--arrivals", "absent.csv"), 1, "cannot be read"),
])
def test_a_mistake_is_one_line(replay, options, code: int, said: str) -> None:
    got, _, err = replay("rows", options=options)
    assert got == code and said in one_line(err)


def test_a_dispatch_of_the_plans_own_name_keeps_its_parameters(
    run: Run, trace: Path, place: Path
) -> None:
    """Step times and the comparison's are judged under one and the same dispatch."""
    flat = np.concatenate([np.arange(16), np.arange(16)]).reshape(4, 8).astype(np.int16)
    own = DispatchSpec(policy="balanced", parameters={"slack": 0.5})
    Plan(np.stack([flat, flat]), 16, dispatch=own).save(place / "slack.json")
    code, out, err = run("replay", trace, place / "slack.json", "--model", place / "model.json",
                         "--dispatch", "balanced", *STEPS, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["comparison"]["rows"][0]["step_time_us"] == pytest.approx(
        document["plans"]["slack"]["step_us"]["mean"]
    )


@pytest.fixture
def cache(run: Run, trace: Path, place: Path):
    """Runs `cache` on the trace."""
    def call(*options: object) -> tuple[int, str, str]:
        return run("cache", trace, "--model", place / "model.json", "--max-steps", 60, *options)

    return call


def test_policies_stand_side_by_side_least_stall_first(cache) -> None:
    code, out, _ = cache("--slots", 6, "--json")
    document = json.loads(out)
    stalls = [row["stall_us"] for row in document["rows"]]
    assert code == 0 and stalls == sorted(stalls) and len(stalls) == 6 + 2 * 5
    demand = {r["policy"]: r["hit_rate"] for r in document["rows"] if r["predictor"] == "none"}
    assert max(demand, key=lambda policy: demand[policy]) == "belady"
    code, out, _ = cache("--slots", 6)
    assert code == 0 and "hits" in out.splitlines()[0] and "belady (bound)" in out


def test_room_for_all_leaves_only_first_loads(cache) -> None:
    code, out, _ = cache("--slots", 16, "--predictor", "none", "--json")
    assert code == 0
    assert {row["loads"] for row in json.loads(out)["rows"]} <= set(range(33))
    assert len({row["hit_rate"] for row in json.loads(out)["rows"]}) == 1


@pytest.mark.parametrize(("options", "code", "said"), [
    (("--slots", 0), 2, "--slots 0"),
    (("--slots", 4, "--policy", "luck"), 2, "belady"),
    (("--slots", 4, "--predictor", "luck"), 2, "look_ahead"),
    (("--slots", 4, "--policy", "belady", "--predictor", "look_ahead"), 2, "none"),
    (("--slots", 4, "--tier", "tape"), 2, "host or disk"),
    (("--slots", 4, "--accuracy", "nan"), 2, "--accuracy"),
    (("--slots", 4, "--step-tokens", 0), 2, "--step-tokens 0"),
])
def test_a_cache_that_cannot_be_is_one_line(cache, options, code: int, said: str) -> None:
    got, _, err = cache(*options)
    assert got == code and said in one_line(err)
