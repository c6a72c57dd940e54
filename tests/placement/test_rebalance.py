"""rebalance(): budgets kept, moves in order, nothing moved for nothing, when it pays back."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost import move_cost
from loadmaster.placement.evaluate import evaluate
from loadmaster.placement.plan import Plan
from loadmaster.placement.planner import PlanResult, plan
from loadmaster.placement.rebalance import keep_places, rebalance
from loadmaster.traces.profile import Profile
from loadmaster.traces.spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth import synth_trace, zipf_shares

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
STANDING = plan(OLD, CLUSTER, steps=STEPS, effort="fast").plan


def quick(source: Any = NEW, current: Plan = STANDING, **asked: Any) -> PlanResult:
    return rebalance(current, source, CLUSTER, **({"steps": STEPS, "effort": "fast"} | asked))


def balance(made: Plan) -> float:
    return evaluate(made, NEW, CLUSTER, steps=STEPS).imbalance_mean


# ---- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 3, 8, 100])
def test_no_more_moves_than_allowed_and_the_list_is_what_differs(budget: int) -> None:
    result = quick(max_moves=budget)
    assert len(result.moves) <= budget
    assert sorted(result.moves) == STANDING.moves_to(result.plan)
    assert result.plan.duplicates == 0


def test_a_larger_budget_is_not_worse() -> None:
    reached = [balance(quick(max_moves=budget).plan) for budget in (0, 2, 6, 30)]
    assert reached[0] == balance(STANDING)
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
    assert result.moves == () and result.plan.same_slots(STANDING)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), budget=st.integers(0, 12))
def test_whatever_stood_before_the_budget_is_kept_and_the_plan_sound(
    seed: int, budget: int
) -> None:
    """Standing plans nobody planned: random, with empty slots and uneven copies."""
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


# ---- nothing for nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("draw", [1, 2, 3])
def test_another_sample_of_the_same_traffic_moves_nothing(draw: int) -> None:
    result = quick(trace_of(1, draw=draw))
    assert result.moves == () and result.plan.same_slots(STANDING)
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
    standing = plan(Profile.from_loads(first), cluster, dispatch="even").plan
    result = rebalance(standing, Profile.from_loads(again), cluster, dispatch="even")
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
    standing = plan(Profile.from_loads(first), cluster, dispatch="even").plan
    result = rebalance(standing, Profile.from_loads(after), cluster, dispatch="even")
    assert 0 < len(result.moves) <= int(0.1 * 6 * 80)
    kept = rebalance(
        standing, Profile.from_loads(after), cluster, dispatch="even", max_moves=0
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
        before, after = STANDING.slots[layer, device], result.plan.slots[layer, device]
        for slot in range(5):
            if after[slot] in before and after[slot] >= 0:
                assert (layer, device, int(after[slot])) not in new
                assert before[slot] == after[slot]


def test_places_are_kept_where_the_same_experts_stay() -> None:
    before = np.array([[3, 1, 2], [0, -1, 4]], np.int16)
    after = np.array([[1, 5, 3], [4, 0, 2]], np.int16)
    assert keep_places(before, after).tolist() == [[3, 1, 5], [0, 2, 4]]


def test_the_pay_back_is_the_transfer_over_the_time_saved_in_each_step() -> None:
    """Slow devices and long steps: time follows the tokens of the busiest."""
    new, steps = trace_of(2, tokens=24_000), StepSampler(tokens=1024, concurrency=16)
    slow = Cluster.preset("cpu", devices_per_node=4, slots_per_device=5)
    result = rebalance(STANDING, new, slow, max_moves=6, model=MODEL, steps=steps, effort="fast")
    assert result.moves and result.pays_back_after_steps is not None
    transfer_us = move_cost(list(result.moves), STANDING, MODEL, slow).us
    saved_us = transfer_us / result.pays_back_after_steps
    both = [
        evaluate(
            Plan(slots, num_experts=EXPERTS), new, slow, steps=steps, model=MODEL
        ).step_time_us
        for slots in (STANDING.slots, result.plan.slots)
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
