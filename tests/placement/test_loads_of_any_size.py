"""Loads of any size: the same shares get the same plan, from a millionth of a token to 1e15."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loadmaster as lm
from loadmaster.errors import InputError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.lower_bounds import balance_bound_W
from loadmaster.placement.dispatch.policies import POLICIES
from loadmaster.placement.dispatch.quotas import device_tokens, split
from loadmaster.placement.methods.baselines import LAYER_METHODS
from loadmaster.placement.plan import DispatchSpec
from loadmaster.placement.planning_traffic import LOAD_TOTAL, in_units
from loadmaster.traces.profile import Profile

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data not present: {DATA}")

CLUSTER = Cluster.preset("h100", devices_per_node=4, slots_per_device=3)
TWO_NODES = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=3)
SCALES = st.sampled_from([1e-6, 1e-3, 7.0, 2.0**31, 3e9, 1e12, 1e15])


def shares(seed: int, windows: int = 2, layers: int = 1, experts: int = 8) -> np.ndarray:
    """Skewed loads that add up to about one per window and layer."""
    raw = np.random.default_rng(seed).gamma(0.5, 1.0, (windows, layers, experts)) + 1e-3
    return np.asarray(raw / raw.sum(axis=2, keepdims=True))


@given(st.integers(0, 10_000), SCALES, st.sampled_from([*LAYER_METHODS, "auto"]),
       st.sampled_from(sorted(POLICIES)))
@settings(max_examples=60, deadline=None)
def test_a_plan_depends_on_shares_alone(
    seed: int, scale: float, method: str, dispatch: str
) -> None:
    """Slots, objective and bound are those of the loads as they were."""
    options = {"method": method, "dispatch": dispatch, "effort": "fast"}
    once = lm.plan(Profile.from_loads(shares(seed)), TWO_NODES, **options)
    again = lm.plan(Profile.from_loads(shares(seed) * scale), TWO_NODES, **options)
    assert np.array_equal(once.plan.slots, again.plan.slots)
    assert again.evidence.objective == pytest.approx(once.evidence.objective, rel=1e-9)
    assert again.evidence.bound == pytest.approx(once.evidence.bound, rel=1e-9)
    assert again.evidence.bound <= again.evidence.objective


@given(st.integers(0, 10_000), SCALES)
@settings(max_examples=40, deadline=None)
def test_an_objective_is_what_the_loads_say(seed: int, scale: float) -> None:
    """Under an even split it is the busiest device over the mean, reckoned here by hand."""
    load_WLE = shares(seed) * scale
    made = lm.plan(Profile.from_loads(load_WLE), CLUSTER, method="greedy", dispatch="even")
    slots_GC = made.plan.slots[0]
    replicas_E = np.bincount(slots_GC[slots_GC >= 0], minlength=8)
    by_hand = []
    for load_E in load_WLE[:, 0]:
        load_G = [sum(load_E[e] / replicas_E[e] for e in row if e >= 0) for row in slots_GC]
        by_hand.append(max(load_G) / (sum(load_G) / 4))
    assert made.evidence.objective == pytest.approx(np.mean(by_hand), rel=1e-6)


@given(st.integers(0, 10_000), SCALES)
@settings(max_examples=40, deadline=None)
def test_units_keep_shares_and_the_weight_of_windows(seed: int, scale: float) -> None:
    weight_W = np.array([1.0, 0.25, 1e-4])
    load_WLE = shares(seed, windows=3, layers=2) * scale * weight_W[:, None, None]
    unit_WLE, _ = in_units(load_WLE)
    total_WL = unit_WLE.sum(axis=2)
    assert total_WL.max(axis=0) == pytest.approx([LOAD_TOTAL] * 2)
    assert total_WL[:, 0] / total_WL[0, 0] == pytest.approx(weight_W, rel=1e-6)
    assert unit_WLE / total_WL[:, :, None] == pytest.approx(
        load_WLE / load_WLE.sum(axis=2, keepdims=True), abs=1e-7
    )


def test_units_tell_what_they_count() -> None:
    """Whole numbers are counts, whose noise is known; others are not."""
    counts = np.array([[[30.0, 10.0]]])
    unit, counted = in_units(counts)
    assert counted is not None and unit * counted == pytest.approx(counts)
    assert in_units(counts / 7)[1] is None


@given(st.integers(0, 10_000), st.sampled_from([2.0**31, 1e10, 1e12]))
@settings(max_examples=60, deadline=None)
def test_counts_beyond_32_bits_are_split_whole(seed: int, scale: float) -> None:
    """Every token gets a slot that holds its expert, and the flattest split is no worse than in
    small numbers."""
    rng = np.random.default_rng(seed)
    small_GE = rng.integers(1, 50, (4, 8))
    large_GE = small_GE * int(scale)
    slots_GC = np.stack([rng.permutation(8)[:3] for _ in range(4)])
    missing = np.setdiff1d(np.arange(8), slots_GC)
    large_GE[:, missing], small_GE[:, missing] = 0, 0
    for policy in ("even", "nearest", "balanced", "fewest_active", "sglang_static"):
        quotas_GS = split(large_GE, slots_GC, CLUSTER, DispatchSpec(policy=policy))
        assert (quotas_GS >= 0).all()
        for e in range(8):
            assert quotas_GS[:, slots_GC.reshape(-1) == e].sum(axis=1).tolist() == (
                large_GE[:, e].tolist()
            )
        tokens_WG, _ = device_tokens(large_GE[None], slots_GC, CLUSTER, DispatchSpec(policy=policy))
        assert tokens_WG.sum() == large_GE.sum()
        if policy == "balanced":
            few_WG, _ = device_tokens(
                small_GE[None], slots_GC, CLUSTER, DispatchSpec(policy=policy)
            )
            assert tokens_WG.max() / scale <= few_WG.max() + 1e-6


def test_more_tokens_than_a_rule_can_look_at_are_refused() -> None:
    counts_GE = np.full((4, 8), 1 << 33)
    slots_GC = np.arange(8).reshape(4, 2)
    with pytest.raises(InputError, match="more than vllm_hash can split one by one"):
        split(counts_GE, slots_GC, CLUSTER, DispatchSpec(policy="vllm_hash"))
    with pytest.raises(InputError, match="more than balanced can split"):
        split(counts_GE << 20, slots_GC, CLUSTER, DispatchSpec(policy="balanced"))
    with pytest.raises(InputError, match="counts must be at least 0; there is -1"):
        split(np.full((4, 8), -1), slots_GC, CLUSTER, DispatchSpec(policy="balanced"))


@given(st.integers(0, 10_000), st.sampled_from([1e-6, 1e15]))
@settings(max_examples=30, deadline=None)
def test_a_bound_depends_on_shares_alone(seed: int, scale: float) -> None:
    load_WE = shares(seed)[:, 0]
    speed_G = np.array([1.0, 1.0, 2.0, 0.5])
    assert balance_bound_W(load_WE * scale, 10, speed_G) == pytest.approx(
        balance_bound_W(load_WE, 10, speed_G), rel=1e-9
    )


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e12])
def test_rebalance_sees_a_change_at_any_scale(scale: float) -> None:
    """Loads that turned round are worth moves, whatever they count."""
    load_LE = np.rint(shares(3)[0] * 1e6)
    cluster = CLUSTER.with_slots(2)
    current = lm.plan(Profile.from_loads(load_LE), cluster, method="greedy").plan
    turned = Profile.from_loads(np.stack([load_LE[:, ::-1]] * 4) * scale)
    moved = lm.rebalance(current, turned, cluster, max_moves=4)
    assert 0 < len(moved.moves) <= 4
    assert moved.evidence.objective < lm.rebalance(current, turned, cluster, max_moves=0
                                                   ).evidence.objective


@needs_data
def test_recorded_sums_of_a_day_are_planned_like_those_of_an_hour() -> None:
    """1e9 and 1e12 assignments per layer: 2**31 lies between them."""
    found = []
    for name in ("loads_1e9_assignments_per_layer", "loads_1e12_assignments_per_layer"):
        load = np.load(DATA / "field" / "dumps" / f"{name}.npz")["expert_load"]
        cluster = Cluster.preset("h100", slots_per_device=3)
        found += [lm.plan(Profile.from_loads(x), cluster) for x in (load, load * 1e-5)]
    assert all(np.array_equal(r.plan.slots, found[0].plan.slots) for r in found)
    assert all(1.0 <= r.evidence.bound <= r.evidence.objective < 1.01 for r in found)


def test_a_time_limit_holds_for_loads_beyond_32_bits() -> None:
    """With a limit long past there is still an answer, said to be the first found."""
    load = shares(1) * 1e13
    lm.plan(Profile.from_loads(load), CLUSTER)               # compiles what it needs
    began = time.monotonic()
    made = lm.plan(Profile.from_loads(load), CLUSTER, time_limit_s=1e-9)
    assert made.truncated and time.monotonic() - began < 30
