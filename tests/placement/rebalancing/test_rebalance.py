"""rebalance(): budgets kept, moves in order, nothing moved for nothing, when it pays back."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.comparison.cross_validation import request_halves
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.cost.step_cost import move_cost
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.planner import PlanResult, plan
from loadmaster.placement.rebalancing.budget_sweep import BudgetSweep, allowances, chosen_levels
from loadmaster.placement.rebalancing.move_budget import Budget
from loadmaster.placement.rebalancing.rebalance import keep_slots, rebalance
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace, zipf_shares

LAYERS, EXPERTS, TOP_K = 2, 16, 2
STEPS = StepSampler(tokens=128, concurrency=16)
CLUSTER = Cluster.preset("h100", devices_per_node=4, slots_per_device=5)
SLOTS = LAYERS * CLUSTER.total_slots
MODEL = ModelSpec(
    name="tiny", num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, hidden=1024,
    intermediate=2048,
)


def trace_of(seed: int, tokens: int = 6000, draw: int = 0) -> Any:
    """Routing of one kind of traffic; `draw` takes another sample of the same kind."""
    share_LE = zipf_shares(np.random.default_rng(seed), LAYERS, EXPERTS, 0.8, cap=1 / TOP_K)
    return synth_trace(
        share_LE=share_LE, top_k=TOP_K, tokens=tokens, request_tokens=60, block_share=0.0,
        seed=1000 * seed + draw,
    )


OLD, NEW = trace_of(1), trace_of(2)


@functools.cache
def old_plan() -> Plan:
    """The plan made for the traffic of before; made when it is first asked for, not to be found."""
    return plan(OLD, CLUSTER, steps=STEPS, effort="fast").plan


def quick(source: Any = NEW, current: Plan | None = None, **asked: Any) -> PlanResult:
    options = {"steps": STEPS, "effort": "fast"} | asked
    return rebalance(current or old_plan(), source, CLUSTER, **options)


def balance(made: Plan) -> float:
    return evaluate(made, NEW, CLUSTER, steps=STEPS).imbalance_mean


# ---- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 3, 8, 100])
def test_no_more_moves_than_allowed_and_the_list_is_what_differs(budget: int) -> None:
    result = quick(max_moves=budget)
    assert len(result.moves) <= budget
    assert sorted(result.moves) == old_plan().moves_to(result.plan)
    assert result.plan.duplicates == 0


def test_a_larger_budget_is_not_worse() -> None:
    reached = [balance(quick(max_moves=budget).plan) for budget in (0, 2, 6, 30)]
    assert reached[0] == balance(old_plan())
    assert reached[-1] < reached[0] - 0.02
    assert all(after <= before + 0.01 for before, after in itertools.pairwise(reached))


def test_without_a_budget_a_tenth_of_the_filled_slots_may_move() -> None:
    assert 0 < len(quick().moves) <= SLOTS // 10


def test_bytes_limit_as_moves_do_and_the_tighter_budget_counts() -> None:
    expert = int(MODEL.bytes_per_expert_E()[0])
    in_bytes = quick(max_bytes=3 * expert + expert // 2, model=MODEL, objective="balance")
    assert 0 < len(in_bytes.moves) <= 3
    both = quick(max_bytes=9 * expert, max_moves=2, model=MODEL, objective="balance")
    assert len(both.moves) <= 2


def test_large_experts_cost_more_of_the_bytes() -> None:
    sizes = tuple(10_000 if e < EXPERTS // 2 else 1_000 for e in range(EXPERTS))
    model = MODEL.model_copy(update={"expert_bytes": sizes})
    result = quick(max_bytes=15_000, model=model, objective="balance")
    assert result.moves
    assert sum(sizes[expert] for _, _, expert in result.moves) <= 15_000


@pytest.mark.parametrize("nothing", [{"max_moves": 0}, {"max_bytes": 0, "model": MODEL}])
def test_a_budget_of_nothing_moves_nothing(nothing: dict[str, Any]) -> None:
    result = quick(objective="balance", **nothing)
    assert result.moves == () and result.plan.same_slots(old_plan())


@pytest.mark.parametrize("seed", [0, 5])
def test_gains_in_few_layers_do_not_stretch_the_budget(seed: int) -> None:
    """Half the layers drifted: each wants more than its even share, and less than it first took."""
    rng = np.random.default_rng(seed)
    before_LE = zipf_shares(rng, 6, 32, 1.0, cap=1 / 8)
    after_LE = before_LE * np.exp(0.5 * rng.standard_normal(before_LE.shape))
    after_LE[3:] = before_LE[3:]
    after_LE /= after_LE.sum(axis=1, keepdims=True)
    counted = [
        Profile.from_loads(np.stack([rng.multinomial(400_000, p) for p in x]))
        for x in (before_LE, after_LE)
    ]
    cluster = Cluster.preset("h100", devices_per_node=8, slots_per_device=5)
    old_plan = plan(counted[0], cluster, dispatch="even", effort="fast").plan
    moved = rebalance(old_plan, counted[1], cluster, dispatch="even", max_moves=18, effort="fast")
    assert 0 < len(moved.moves) <= 18


def test_bytes_are_counted_whole() -> None:
    """Shares of a budget round; a byte too many is still too many."""
    budget = Budget(moves=None, bytes=10**15, bytes_E=np.array([10**15 // 3, 10**15 // 3 + 1]))
    assert budget.covers([0, 0, 1]) and not budget.covers([0, 1, 1])
    assert Budget(moves=2, bytes=None, bytes_E=None).covers([5, 5])
    assert not Budget(moves=2, bytes=None, bytes_E=None).covers([5, 5, 5])


def ladder_of(gains: list[float], prices: list[float], budgets: tuple[float, ...]) -> BudgetSweep:
    cost_KW = 2.0 - np.array([gains]).T
    wide_FK = np.tile(cost_KW.T, (2, 1))
    prices_FK = np.array([prices, prices])
    return BudgetSweep(budgets, ((), ()), prices_FK, (cost_KW, cost_KW), wide_FK, 0.0)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_last_searches_get_together_no_more_than_the_whole(data: st.DataObject) -> None:
    fraction = st.floats(0, 1)
    sweeps = []
    for _ in range(data.draw(st.integers(1, 5))):
        budgets = (0.0, *sorted(data.draw(st.lists(fraction, min_size=2, max_size=2))))
        prices = [budget * data.draw(fraction) for budget in budgets]
        gains = [0.0, *data.draw(st.lists(st.floats(-1, 1), min_size=2, max_size=2))]
        sweeps.append(ladder_of(gains, prices, budgets))
    levels = chosen_levels(sweeps)
    allowed = allowances(sweeps, levels)
    assert sum(most for most in allowed if most is not None) <= 1 + 1e-8
    for ladder, level, most in zip(sweeps, levels, allowed, strict=True):
        assert (most is None) == (level == 0)
        assert most is None or ladder.price_FK[0, level] <= most * (1 + 1e-9)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), budget=st.integers(0, 12))
def test_whatever_stood_before_the_budget_is_kept_and_the_plan_sound(
    seed: int, budget: int
) -> None:
    """Standing plans nobody planned: random, with empty slots and uneven replicas."""
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(LAYERS):
        spare = rng.integers(-1, EXPERTS, CLUSTER.total_slots - EXPERTS)
        layers.append(rng.permutation(np.concatenate([np.arange(EXPERTS), spare])).reshape(4, 5))
    current = Plan(np.stack(layers).astype(np.int16), num_experts=EXPERTS)
    result = quick(current=current, max_moves=budget)
    assert len(result.moves) <= budget
    assert sorted(result.moves) == current.moves_to(result.plan)
    assert result.evidence.bound <= result.evidence.objective


# ---- clusters and plans of different widths -----------------------------------------------------


@pytest.mark.parametrize("slots", [6, 8])
@pytest.mark.parametrize("dispatch", ["balanced", "even"])
@pytest.mark.parametrize("source", [NEW, Profile.from_loads(NEW.load_LE())])
def test_a_plan_narrower_than_the_cluster_may_use_all_its_slots(
    slots: int, dispatch: str, source: Any
) -> None:
    wider = Cluster.preset("h100", devices_per_node=4, slots_per_device=slots)
    moved = rebalance(
        old_plan(), source, wider, steps=STEPS, effort="fast", max_moves=20, dispatch=dispatch
    )
    assert 0 < len(moved.moves) <= 20
    assert 5 <= moved.plan.slots_per_device <= slots
    kept = rebalance(old_plan(), source, wider, steps=STEPS, effort="fast", max_moves=0)
    assert kept.moves == () and kept.plan.same_slots(old_plan())


def test_experts_beyond_a_devices_own_slots_move_into_them() -> None:
    """Device 3 has 3 slots, the standing plan is 5 wide and uses the last."""
    short = CLUSTER.devices[3].model_copy(update={"slots": 3})
    uneven = Cluster(devices=(*CLUSTER.devices[:3], short), hardware=CLUSTER.hardware)
    current_GC = np.array(
        [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 0], [-1, 14, -1, -1, 15]]
    )
    old_plan = Plan(np.stack([current_GC, current_GC]), num_experts=EXPERTS)
    for budget in (0, 6):
        made = rebalance(
            old_plan, NEW, uneven, steps=STEPS, effort="fast", max_moves=budget
        ).plan
        assert (made.slots[:, 3, 3:] == -1).all()
    held = current_GC.copy()
    held[3] = [1, 14, -1, 2, 15]
    with pytest.raises(InputError, match="fills 4 slots of device 3 in layer 0, the cluster has 3"):
        rebalance(
            Plan(np.stack([held, held]), num_experts=EXPERTS), NEW, uneven, steps=STEPS
        )


# ---- nothing for nothing ----------------------------------------------------------------------


def of_one_kind(tokens: int, seed: int) -> Any:
    """Long requests that use the same experts throughout: a few of them tell little of others."""
    share_LE = zipf_shares(np.random.default_rng(1), LAYERS, EXPERTS, 0.8, cap=1 / TOP_K)
    return synth_trace(
        share_LE=share_LE, top_k=TOP_K, tokens=tokens, request_tokens=100, block_share=1.0,
        seed=seed,
    )


def test_a_few_requests_of_the_same_kind_do_not_make_others_worse() -> None:
    """Their steps agree with each other, because they share requests, and with nothing else."""
    old_plan = plan(of_one_kind(12_000, 1), CLUSTER, steps=STEPS, effort="fast").plan
    rest = of_one_kind(12_000, 2)
    for tokens, seed in ((800, 11), (1600, 10), (1600, 12), (2400, 12)):
        moved = quick(of_one_kind(tokens, seed), old_plan, max_moves=8)
        if tokens < 1000:
            assert moved.moves == ()
            assert any("too few requests" in note for note in moved.evidence.notes)
        before, after = (
            evaluate(p, rest, CLUSTER, steps=STEPS).imbalance_mean for p in (old_plan, moved.plan)
        )
        assert after <= before


def test_halves_share_no_request_and_use_all_of_them() -> None:
    halves = request_halves(NEW, STEPS, seed=0)
    assert halves is not None
    requests = [set(half.data.trace.request_T().tolist()) for half in halves]
    assert not requests[0] & requests[1]
    assert requests[0] | requests[1] == set(NEW.request_T().tolist())
    for half in halves:
        assert half.data.validation is None and len(half.data.planning) >= 2


def test_halves_that_fill_no_step_are_judged_on_smaller_ones() -> None:
    halves = request_halves(trace_of(2, tokens=900), StepSampler(tokens=512), seed=0)
    assert halves is not None
    assert all(np.diff(half.data.planning.offset).max() <= 450 for half in halves)


@pytest.mark.parametrize("draw", [1, 2, 3])
def test_another_sample_of_the_same_traffic_moves_nothing(draw: int) -> None:
    result = quick(trace_of(1, draw=draw))
    assert result.moves == () and result.plan.same_slots(old_plan())
    assert result.pays_back_after_steps is None


@pytest.mark.parametrize("seed", range(3))
def test_another_count_of_the_same_loads_moves_nothing(seed: int) -> None:
    """Loads alone: a resample differs by counting noise only."""
    rng = np.random.default_rng(seed)
    share_LE = zipf_shares(rng, 6, 64, 1.0, cap=1 / 8)
    first, again = (
        np.stack([rng.multinomial(400_000, share_E) for share_E in share_LE]) for _ in range(2)
    )
    cluster = Cluster.preset("h100", devices_per_node=8, slots_per_device=10)
    old_plan = plan(Profile.from_loads(first), cluster, dispatch="even").plan
    result = rebalance(old_plan, Profile.from_loads(again), cluster, dispatch="even")
    assert result.moves == ()


def test_drifted_loads_do_move() -> None:
    rng = np.random.default_rng(0)
    share_LE = zipf_shares(rng, 6, 64, 1.0, cap=1 / 8)
    drifted_LE = share_LE * np.exp(0.3 * rng.standard_normal(share_LE.shape))
    drifted_LE /= drifted_LE.sum(axis=1, keepdims=True)
    first, after = (
        np.stack([rng.multinomial(400_000, p) for p in part]) for part in (share_LE, drifted_LE)
    )
    cluster = Cluster.preset("h100", devices_per_node=8, slots_per_device=10)
    old_plan = plan(Profile.from_loads(first), cluster, dispatch="even").plan
    result = rebalance(old_plan, Profile.from_loads(after), cluster, dispatch="even")
    assert 0 < len(result.moves) <= int(0.1 * 6 * 80)
    kept = rebalance(
        old_plan, Profile.from_loads(after), cluster, dispatch="even", max_moves=0
    )
    assert result.evidence.objective < kept.evidence.objective - 0.02


# ---- order, places, pay-back ------------------------------------------------------------------


def test_moves_come_layer_by_layer_and_each_layer_at_once() -> None:
    """The layer that gains most is sent first: a stop half-way leaves whole layers done."""
    order = [layer for layer, _, _ in quick(max_moves=12).moves]
    assert order == sorted(order, key=order.index)


def test_experts_that_stay_keep_their_slots() -> None:
    result = quick(max_moves=6)
    new = {(layer, device, expert) for layer, device, expert in result.moves}
    for layer, device in np.ndindex(LAYERS, 4):
        before, after = old_plan().slots[layer, device], result.plan.slots[layer, device]
        for slot in range(5):
            if after[slot] in before and after[slot] >= 0:
                assert (layer, device, int(after[slot])) not in new
                assert before[slot] == after[slot]


def test_places_are_kept_where_the_same_experts_stay() -> None:
    before = np.array([[3, 1, 2], [0, -1, 4]], np.int16)
    after = np.array([[1, 5, 3], [4, 0, 2]], np.int16)
    assert keep_slots(before, after).tolist() == [[3, 1, 5], [0, 2, 4]]


def test_the_pay_back_is_the_transfer_over_the_time_saved_in_each_step() -> None:
    """Slow devices and long steps: time follows the tokens of the busiest."""
    new, steps = trace_of(2, tokens=24_000), StepSampler(tokens=1024, concurrency=16)
    slow = Cluster.preset("cpu", devices_per_node=4, slots_per_device=5)
    result = rebalance(old_plan(), new, slow, max_moves=6, model=MODEL, steps=steps, effort="fast")
    assert result.moves and result.pays_back_after_steps is not None
    transfer_us = move_cost(list(result.moves), old_plan(), MODEL, slow).us
    saved_us = transfer_us / result.pays_back_after_steps
    both = [
        evaluate(
            Plan(slots, num_experts=EXPERTS), new, slow, steps=steps, model=MODEL
        ).step_time_us
        for slots in (old_plan().slots, result.plan.slots)
    ]
    assert both[0] is not None and both[1] is not None
    assert saved_us == pytest.approx(both[0] - both[1], rel=0.3)   # on other steps


def test_without_a_model_nobody_knows_when_it_pays_back() -> None:
    assert quick(max_moves=6).pays_back_after_steps is None


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "said"), [
    ({"max_moves": -1}, "max_moves -1"),
    ({"max_bytes": -5, "model": MODEL}, "max_bytes -5"),
    ({"max_bytes": 100}, "needs the experts' sizes"),
])
def test_budgets_that_mean_nothing_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        quick(**asked)


def test_a_plan_for_another_model_is_refused() -> None:
    other = Plan(np.arange(8).reshape(1, 4, 2), num_experts=8)
    with pytest.raises(InputError, match="the current plan has 1 layers of 8 experts"):
        quick(current=other)


def test_the_same_question_gets_the_same_bytes() -> None:
    assert quick(max_moves=5).plan.to_json() == quick(max_moves=5).plan.to_json()
