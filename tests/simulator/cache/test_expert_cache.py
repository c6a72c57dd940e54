"""The expert cache: which policies keep what is needed, and what predictions save."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.simulator.cache.expert_cache import CacheTier, play_cache
from loadmaster.simulator.cache.policies import POLICIES
from loadmaster.simulator.cache.predictors import ConditionalFrequency, LookAhead
from loadmaster.traces.steps import Steps, StepSampler
from loadmaster.traces.trace import RoutingTrace

from ..conftest import EXPERTS, LAYERS


def one_layer(active_per_step, experts: int) -> tuple[RoutingTrace, Steps]:
    """A trace of one layer in which step w activates exactly the listed experts."""
    ids = np.array([e for step in active_per_step for e in step]).reshape(-1, 1, 1)
    trace = RoutingTrace.from_arrays(ids, num_experts=experts)
    offset = np.cumsum([0, *(len(step) for step in active_per_step)])
    return trace, Steps(np.arange(len(ids)), offset)


def hits(active_per_step, experts, slots, policy) -> int:
    trace, steps = one_layer(active_per_step, experts)
    return play_cache(trace, steps, CacheTier(slots, 1.0), policy=policy).hits


def test_a_scan_over_all_experts_defeats_lru_and_not_lifo() -> None:
    """Experts 0..4 in every step, room for three: LRU always evicts the next one needed."""
    scan = [[0, 1, 2, 3, 4]] * 10
    assert hits(scan, 5, 3, "lru") == hits(scan, 5, 3, "fifo") == 0
    assert hits(scan, 5, 3, "lifo_after_inactive") >= 9 * 2
    assert hits(scan, 5, 3, "lifo_after_inactive") == hits(scan, 5, 3, "belady")


def test_inactive_experts_leave_before_active_ones() -> None:
    """0 and 1 run in every step; the visitor of the step before goes, never 0 or 1."""
    steps = [[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 2]]
    assert hits(steps, 5, 3, "lifo_after_inactive") == 3 * 2


def test_frequent_experts_stay_under_lfu() -> None:
    steps = [[0], [0], [0], [1], [2], [0], [3], [0]]
    assert hits(steps, 4, 2, "lfu") == 4 and hits(steps, 4, 2, "fifo") == 3


def _slow_optimum(accesses, slots) -> int:
    """Most hits of any policy, by trying every victim."""
    best = {frozenset(): 0}
    for expert in accesses:
        after: dict[frozenset[int], int] = {}
        for held, count in best.items():
            if expert in held:
                options = [(held, count + 1)]
            elif len(held) < slots:
                options = [(held | {expert}, count)]
            else:
                options = [((held - {victim}) | {expert}, count) for victim in held]
            for new, score in options:
                after[new] = max(after.get(new, -1), score)
        best = after
    return max(best.values())


STEPS = st.lists(
    st.sets(st.integers(0, 5), min_size=1, max_size=4).map(sorted), min_size=1, max_size=12
)


@given(STEPS, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_belady_is_the_optimum_and_no_policy_beats_it(steps, slots) -> None:
    best = hits(steps, 6, slots, "belady")
    assert best == _slow_optimum([e for step in steps for e in step], slots)
    assert all(hits(steps, 6, slots, name) <= best for name in POLICIES)


def test_room_for_all_misses_each_expert_once(trace) -> None:
    steps = StepSampler(tokens=64, concurrency=8).sample(trace)
    result = play_cache(trace, steps, CacheTier(EXPERTS, 5.0))
    touched = int((trace.load_LE(steps.token) > 0).sum())
    assert result.loads == touched and result.accesses - result.hits == touched
    assert result.wasted == 0


def test_every_miss_stalls_for_a_load_when_nothing_computes(trace) -> None:
    steps = StepSampler(tokens=16, concurrency=8).sample(trace, max_steps=20)
    result = play_cache(trace, steps, CacheTier(2, 7.0))
    assert result.stall_us == pytest.approx(7.0 * (result.accesses - result.hits))
    assert result.compute_us == 0.0


def test_knowing_the_next_layer_hides_loads_behind_compute(trace) -> None:
    """A perfect look-ahead with time to load: only layer 0 still stalls."""
    steps = StepSampler(tokens=4, concurrency=4).sample(trace, max_steps=40)
    tier = CacheTier(EXPERTS, 1.0)
    blind = play_cache(trace, steps, tier, policy="lru", expert_us=50.0)
    sure = LookAhead.with_accuracy(trace, 1.0)
    seen = play_cache(trace, steps, tier, policy="lru", expert_us=50.0, predictor=sure)
    assert seen.hit_rate_L[1:] == (1.0,) * (LAYERS - 1)
    assert seen.stall_us < blind.stall_us and seen.prefetched > 0


def test_worse_predictions_hide_less(trace) -> None:
    steps = StepSampler(tokens=4, concurrency=4).sample(trace, max_steps=60)
    stalls = [
        play_cache(trace, steps, CacheTier(4, 20.0), expert_us=60.0,
                   predictor=LookAhead.with_accuracy(trace, accuracy)).stall_us
        for accuracy in (1.0, 0.7, 0.0)
    ]
    assert stalls[0] < stalls[1] < stalls[2]


def test_conditional_frequency_learns_which_expert_follows() -> None:
    """Expert e is always followed by e + 1: learnt on one half, right on the other."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, EXPERTS, 200)
    ids = np.stack([(first + layer) % EXPERTS for layer in range(3)], axis=1)[:, :, None]
    trace = RoutingTrace.from_arrays(ids, num_experts=EXPERTS)
    learnt = ConditionalFrequency(trace.select(np.arange(100)), trace)
    for token in range(100, 120):
        assert learnt.predict(np.array([token]), 1) == [int(ids[token, 1, 0])]
    assert learnt.predict(np.array([0]), 0) == []


def test_shared_slots_follow_the_layers(trace) -> None:
    """As many slots, not tied to layers: the cross-layer policy beats LRU's thrashing."""
    steps = StepSampler(tokens=64, concurrency=8).sample(trace)
    tier = CacheTier(LAYERS * EXPERTS // 2, 1.0, shared=True)
    flow = play_cache(trace, steps, tier, policy="cross_layer")
    assert flow.hit_rate > 2 * play_cache(trace, steps, tier, policy="lru").hit_rate
    assert flow.hits <= play_cache(trace, steps, tier, policy="belady").hits


def test_disk_is_slower_than_host(model) -> None:
    cluster = Cluster.preset("h100", slots_per_device=1)
    host = CacheTier.of(4, model, cluster)
    disk = CacheTier.of(4, model, cluster, tier="disk")
    assert disk.load_us > host.load_us
    bytes_one = int(model.bytes_per_expert_E()[0])
    assert disk.load_us == pytest.approx(bytes_one / 3e9 * 1e6)


def test_what_cannot_be_is_refused(trace, model) -> None:
    steps = StepSampler(tokens=64, concurrency=8).sample(trace, max_steps=1)
    with pytest.raises(UsageError, match="unknown cache policy 'mru'"):
        play_cache(trace, steps, CacheTier(2, 1.0), policy="mru")
    with pytest.raises(UsageError, match="slots 0"):
        CacheTier(0, 1.0)
    with pytest.raises(UsageError, match="unknown cache tier"):
        CacheTier.of(2, model, Cluster.preset("h100", slots_per_device=1), tier="tape")
    other = RoutingTrace.from_arrays(np.zeros((4, LAYERS + 1, 2), int), num_experts=EXPERTS)
    with pytest.raises(InputError, match="the profile has"):
        ConditionalFrequency(other, trace)
    with pytest.raises(UsageError, match="accuracy"):
        LookAhead.with_accuracy(trace, 1.5)
