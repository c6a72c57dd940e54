"""What `plan` answers: methods that cannot, moves that must pay, replicas, little data, time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InfeasibleError, InputError, UsageError
from loadmaster.placement.cluster import Cluster, Device
from loadmaster.placement.plan import Plan
from loadmaster.placement.rebalancing.advise import CURRENT, advise
from loadmaster.placement.rebalancing.advise_loads import advise_loads
from loadmaster.placement.rebalancing.switch_payback import Moving, price_moves
from loadmaster.placement.rebalancing.trial_plans import TimeLimit, try_methods
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.traces.trace import RoutingTrace

STEPS = StepSampler(tokens=128, concurrency=8)
EVEN = Cluster.preset("h100", devices_per_node=4, slots_per_device=5)
UNEVEN = Cluster(
    devices=tuple(Device(node=0, slots=s) for s in (6, 6, 4, 4)), hardware=EVEN.hardware
)
MODEL = ModelSpec(num_layers=2, num_experts=16, top_k=2, hidden=4096, intermediate=2048)
BASELINES = ("eplb", "greedy", "contiguous")


@pytest.fixture(scope="module")
def routing() -> RoutingTrace:
    return synth_trace(layers=2, experts=16, top_k=2, tokens=8000, zipf=1.0, request_tokens=50)


def contiguous() -> Plan:
    held = np.full((2, 4, 5), -1)
    held[:, :, :4] = np.arange(16).reshape(4, 4)
    return Plan(slots=held, num_experts=16)


def lopsided() -> Plan:
    """Five experts each on three devices, one on the last: more weights to read than need be."""
    held = np.full(20, -1)
    held[:16] = np.arange(16)
    return Plan(slots=np.tile(held.reshape(4, 5), (2, 1, 1)), num_experts=16)


def requests(count: int, tokens: int, source: RoutingTrace) -> RoutingTrace:
    """So many requests of one length."""
    return RoutingTrace.from_arrays(source.ids[: count * tokens], num_experts=16,
                                    request=np.repeat(np.arange(count), tokens))


def test_a_method_that_cannot_is_told_and_the_others_go_on(routing: RoutingTrace) -> None:
    advice = advise(routing, UNEVEN, methods=BASELINES, steps=STEPS)
    assert list(advice.results) == ["greedy", "contiguous"]
    assert "equally many slots" in advice.cannot["eplb"]
    assert any(note.startswith("eplb: cannot (EPLB needs") for note in advice.notes)
    document = json.loads(json.dumps(advice.to_dict()))
    assert set(document["cannot"]) == {"eplb"}
    loads = advise_loads(Profile.from_loads(routing.load_LE()), UNEVEN, methods=BASELINES)
    assert set(loads.cannot) == {"eplb"} and loads.chosen == "greedy"


def test_where_no_method_can_the_reason_is_the_error(routing: RoutingTrace) -> None:
    with pytest.raises(InfeasibleError, match="EPLB needs equally many slots"):
        advise(routing, UNEVEN, methods=("eplb",), steps=STEPS)
    with pytest.raises(UsageError, match="unknown method 'luck'"):
        try_methods(routing, EVEN, ("auto", "luck"))


def test_moves_are_priced_and_pay_back_within_the_horizon(routing: RoutingTrace) -> None:
    """The same gain: worth the moves within a long horizon, not within a single step."""
    long = advise(routing, EVEN, methods=("contiguous",), current=lopsided(), steps=STEPS,
                  model=MODEL, horizon_steps=1e9)
    moving = long.moving["contiguous"]
    assert moving.moves == len(lopsided().moves_to(contiguous()))
    assert moving.bytes == moving.moves * int(MODEL.bytes_per_expert_E()[0])
    assert long.chosen == "contiguous" and moving.pays_back_after_steps is not None
    assert f"{moving.moves} experts move" in long.verdict and "paid back after" in long.verdict
    short = advise(routing, EVEN, methods=("contiguous",), current=lopsided(), steps=STEPS,
                   model=MODEL, horizon_steps=moving.pays_back_after_steps / 2)
    assert short.chosen == CURRENT and short.verdict.startswith("leave it: contiguous is better")
    assert "pays back after" in short.verdict and "the horizon is" in short.verdict
    row = next(r for r in short.to_dict()["rows"] if r["name"] == "contiguous")
    assert row["move_bytes"] == moving.bytes and row["pays_back_after_steps"] > 0


def test_without_sizes_moves_are_counted_and_it_is_said(routing: RoutingTrace) -> None:
    advice = advise(routing, EVEN, methods=("greedy",), current=contiguous(), steps=STEPS)
    assert advice.chosen == "greedy"
    assert advice.moving["greedy"].bytes is None and advice.moving["greedy"].moves > 0
    assert "not known without the experts' sizes (--model)" in advice.verdict


def test_a_budget_of_bytes_or_moves_is_kept_and_moves_are_in_order(routing: RoutingTrace) -> None:
    size = int(MODEL.bytes_per_expert_E()[0])
    seen: list[tuple[str, int, int]] = []
    advice = advise(
        routing, EVEN, current=contiguous(), max_bytes=3 * size, steps=STEPS, model=MODEL,
        effort="fast", objective="balance",
        progress=lambda name, done, of, gap: seen.append((name, done, of)),
    )
    assert 0 < advice.moving["rebalance"].moves <= 3
    row = next(r for r in advice.to_dict()["rows"] if r["name"] == "rebalance")
    assert row["ordered_moves"] == [list(m) for m in advice.results["rebalance"].moves]
    assert seen and {(name, of >= done >= 1) for name, done, of in seen} == {("rebalance", True)}
    with pytest.raises(UsageError, match="name the current one"):
        advise(routing, EVEN, max_moves=3, steps=STEPS)


def test_a_current_plan_that_does_not_fit_is_refused_before_planning(routing: RoutingTrace) -> None:
    full = Plan(slots=np.tile(np.arange(16).reshape(4, 4), (2, 1, 2)), num_experts=16)
    with pytest.raises(InputError, match="the current plan fills 8 slots of device 0"):
        advise(routing, EVEN, current=full, steps=STEPS)


def test_fewer_transfers_win_within_slack_at_the_deciding_step() -> None:
    """Both are flat; one has experts in the node that their requests come from."""
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(240), 40)
    first = rng.integers(0, 8, len(request))
    second = (first + rng.integers(1, 8, len(request))) % 8
    ids = (np.stack([first, second], axis=1) + 8 * (request[:, None] % 4 // 2))[:, None]
    source = RoutingTrace.from_arrays(ids, num_experts=16, request=request)
    place = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=4,
                           traffic="return_home/per_node")
    spread = Plan(slots=np.array([[[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]]),
                  num_experts=16)
    advice = advise(source, place, methods=("auto",), current=spread, effort="fast",
                    steps=StepSampler(tokens=512), balance_slack=0.2)
    assert advice.chosen == "auto"
    assert "node transfers per token" in advice.verdict
    row, current_plan = advice.comparison.row("auto"), advice.comparison.row(CURRENT)
    assert row.transfers is not None and row.transfers < 0.8 * (current_plan.transfers or 0)
    assert row.metric <= current_plan.metric + advice.comparison.balance_slack


def test_few_requests_choose_what_is_plainly_better(routing: RoutingTrace) -> None:
    """26 requests leave 8 that judge, all in flight: bands come from redrawing them."""
    few = requests(26, 60, routing)
    advice = advise(few, EVEN, methods=("greedy", "contiguous"), steps=StepSampler(tokens=128))
    assert advice.comparison.significant and advice.chosen == "greedy"
    assert "greedy balances better than contiguous" in advice.verdict


def test_too_few_requests_take_the_best_only_where_no_plan_is_active(routing: RoutingTrace) -> None:
    three, steps = requests(3, 60, routing), StepSampler(tokens=24)
    free = advise(three, EVEN, methods=("greedy", "contiguous"), steps=steps)
    assert free.chosen == free.comparison.rows[0].name == "greedy"
    assert "how sure that is is not known" in free.verdict
    bound = advise(three, EVEN, methods=("greedy",), current=contiguous(), steps=steps)
    assert bound.chosen == CURRENT and bound.verdict.startswith("not enough data: ")


def test_a_trace_too_short_for_one_step_is_said_before_planning(routing: RoutingTrace) -> None:
    planned: list[str] = []
    with pytest.raises(InputError, match="do not fill one step of 512"):
        advise(requests(3, 60, routing), EVEN, methods=("greedy",), steps=StepSampler(tokens=512),
               progress=lambda method, *_: planned.append(method))
    assert not planned


def test_a_time_limit_is_for_all_methods_together(routing: RoutingTrace) -> None:
    began = time.monotonic()
    tried = try_methods(routing, EVEN, ("auto", "moetuner", *BASELINES), time_limit_s=0.02,
                        steps=STEPS, effort="thorough")
    assert list(tried.results) == ["auto", "moetuner", *BASELINES]       # as asked
    assert tried.results["auto"].truncated
    assert time.monotonic() - began < 60
    shares = TimeLimit.start(10.0)
    assert 4.5 < (shares.share(2) or 0) <= 5 and TimeLimit.start(None).share(2) is None
    with pytest.raises(UsageError, match="must be above 0"):
        TimeLimit.start(0.0)


def test_average_loads_judge_the_current_plan_too(routing: RoutingTrace, tmp_path: Path) -> None:
    profile = Profile.from_loads(routing.load_LE())
    advice = advise_loads(profile, EVEN, methods=("greedy",), current=contiguous())
    assert advice.chosen == "greedy" and CURRENT in advice.results
    assert "experts move" in advice.verdict and "under the current plan" in advice.verdict
    flat = advice.plan
    again = advise_loads(profile, EVEN, methods=("greedy",), current=flat)
    assert again.chosen == CURRENT and again.verdict.startswith("leave it: no plan is flatter")


def test_moves_that_cost_nothing_need_not_pay() -> None:
    one = Plan(slots=np.array([[[0, 1, 0], [2, 3, -1]]]), num_experts=4)
    two = Plan(slots=np.array([[[0, 1, -1], [2, 3, -1]]]), num_experts=4)
    place = Cluster.preset("h100", devices_per_node=2, slots_per_device=3)
    model = ModelSpec(num_layers=1, num_experts=4, top_k=2, hidden=64, intermediate=64)
    moving = price_moves(one, two, place, model, gain_us=1.0)
    assert moving.refusal(1.0) is None and str(moving) == "no expert moves"
    worse = Moving(3, 0.5, 10, 100.0, gain_us=-1.0, significant_gain_us=-1.0)
    assert worse.refusal(1e9) is not None


def flat(experts: int = 16, tokens: int = 480_000) -> RoutingTrace:
    """Every expert as likely as the next, whatever the request."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, 2, experts)), axis=2)[:, :, :2]
    return RoutingTrace.from_arrays(ids, num_experts=experts,
                                    request=np.repeat(np.arange(tokens // 50), 50))


def test_a_gain_that_only_memory_buys_is_left() -> None:
    """Flat loads: replicas that every step spreads its chance peaks over gain a little, beyond the
    noise, and that pays for no memory; where nothing prices them, it pays for no moves either."""
    large = StepSampler(tokens=32_768, concurrency=16)
    advice = advise(flat(), EVEN, methods=("greedy", "contiguous"), steps=large)
    row = advice.comparison.row("greedy")
    assert row.better and -1 < row.change_percent < 0
    assert advice.chosen == "contiguous" and advice.verdict.startswith("leave it: greedy balances")
    assert "memory for 8 more replicas, for less than 1 %" in advice.verdict
    bound = advise(flat(), EVEN, methods=("greedy",), current=contiguous(), steps=large)
    assert bound.chosen == CURRENT and "experts to move (" in bound.verdict


def test_balance_is_not_called_time(routing: RoutingTrace) -> None:
    asked: dict[str, Any] = dict(methods=("greedy", "contiguous"), steps=STEPS)
    blind = advise(routing, EVEN, **asked)
    assert blind.verdict.startswith("greedy balances better than contiguous: imbalance ")
    assert blind.verdict.endswith("; this is balance, not time")
    known = advise(routing, EVEN, model=MODEL, objective="balance", **asked)
    assert "; this is balance, not time: step time " in known.verdict
    timed = advise(routing, EVEN, model=MODEL, **asked)
    assert timed.comparison.metric_name == "step_time_us" and "balance" not in timed.verdict


def test_what_bands_assume_is_said(routing: RoutingTrace) -> None:
    (note,) = [n for n in advise(routing, EVEN, methods=("greedy",), steps=STEPS).notes
               if n.startswith("bands: ")]
    assert "other requests of the same kind as these 42" in note
    assert "steps of 128 tokens with 8 in flight" in note and "nothing of other traffic" in note


def test_fine_within_the_slots_given_names_the_slot_that_would_end_it() -> None:
    """One expert has nearly every token and no slot is left: any plan waits for its device."""
    rng = np.random.default_rng(1)
    hot = np.where(rng.random((12_000, 2)) < 0.97, 3, rng.integers(0, 16, (12_000, 2)))
    source = RoutingTrace.from_arrays(hot[:, :, None], num_experts=16,
                                      request=np.repeat(np.arange(240), 50))
    full = Cluster.preset("h100", devices_per_node=4, slots_per_device=4)
    advice = advise(source, full, methods=("greedy", "contiguous"), steps=STEPS)
    assert advice.chosen == "contiguous"
    assert "within the slots given, where the busiest device has 3.9 x the mean" in advice.verdict
    assert "one more slot per device would make it 1." in advice.verdict
    eased = advise(source, EVEN, methods=("greedy", "contiguous"), steps=STEPS)
    assert eased.chosen == "greedy" and "one more slot" not in eased.verdict
