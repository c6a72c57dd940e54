"""A time limit that has fired: the best so far, whole and sound, and what it could not do is said.

No clock is read here: limits lie so far in the past that nothing but what must be is done.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import loadmaster as lm
from loadmaster.errors import UsageError
from loadmaster.foundation.compiled import clock as compiled_clock
from loadmaster.foundation.compiled import compiled, random_state
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.comparison.steps_in_time import LEAST_STEPS, steps_in_time
from loadmaster.placement.cost.token_transfers import no_transfers
from loadmaster.placement.methods.cluster_assignment import place_clusters
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.planner import METHODS
from loadmaster.placement.rebalancing.advise import advise
from loadmaster.placement.rebalancing.advise_loads import advise_loads
from loadmaster.placement.rebalancing.trial_plans import TimeLimit
from loadmaster.placement.search.annealing.annealer import (
    Overload,
    Schedule,
    search_space,
)
from loadmaster.placement.search.annealing.exact_balance import improve_exact_balance
from loadmaster.placement.search.layer_task import HURRIED_STEPS
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.profile import Profile
from loadmaster.traces.synth.generate import synth_trace

PAST = 1e-9                  # seconds: over before anything begins
TRACE = synth_trace(layers=3, experts=16, top_k=2, tokens=20_000, zipf=1.0, request_tokens=50)
LOADS = Profile.from_loads(TRACE.load_LE(), top_k=2)
CLUSTER = Cluster.preset("h100", nodes=2, devices_per_node=4, slots_per_device=3)
STEPS = lm.StepSampler(tokens=128, concurrency=16)
MODEL = ModelSpec(num_layers=3, num_experts=16, top_k=2, hidden=512, intermediate=256)


@pytest.fixture(scope="module")
def contiguous() -> Plan:
    return lm.plan(TRACE, CLUSTER, method="contiguous", steps=STEPS).plan


@compiled
def now() -> float:
    return compiled_clock()


def test_compiled_loops_read_the_same_clock() -> None:
    before = time.time()
    assert before - 1e-3 <= now() <= time.time() + 1e-3


@pytest.mark.parametrize("objective", ["balance", "time"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_with_the_first_it_has(method: str, objective: str) -> None:
    """Every expert is somewhere, no bound is above what was reached, and a note says how little
    the figures rest on."""
    made = lm.plan(TRACE, CLUSTER, method=method, objective=objective, model=MODEL, steps=STEPS,
                   time_limit_s=PAST)
    assert (made.plan.replicas_LGE().sum(axis=1) >= 1).all()
    assert all(layer.bound <= layer.objective for layer in made.evidence.layers)
    said = f"3 of 3 layers judged on at most {HURRIED_STEPS} steps"
    assert any(said in note for note in made.evidence.notes)


@pytest.mark.parametrize("method", ["auto", "affinity", "moetuner"])
def test_what_searches_says_that_it_was_cut_short(method: str) -> None:
    assert lm.plan(TRACE, CLUSTER, method=method, steps=STEPS, time_limit_s=PAST).truncated


def test_a_hurried_plan_is_packed_by_all_loads() -> None:
    """Few steps judge it, all of them make it: it is the packing that it would be anyway."""
    slow = lm.plan(TRACE, CLUSTER, method="greedy", steps=STEPS)
    quick = lm.plan(TRACE, CLUSTER, method="greedy", steps=STEPS, time_limit_s=PAST)
    assert np.array_equal(slow.plan.slots, quick.plan.slots)


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    free = lm.plan(TRACE, CLUSTER, steps=STEPS, effort="fast")
    limited = lm.plan(TRACE, CLUSTER, steps=STEPS, effort="fast", time_limit_s=3600.0)
    assert np.array_equal(free.plan.slots, limited.plan.slots) and not limited.truncated
    assert free.evidence == limited.evidence


def test_a_search_ends_with_the_best_seen_when_its_time_is_up() -> None:
    """Past its deadline it tries no move; without one it does."""
    start_GC = np.array([[0, 1, 4], [2, 3, -1]], np.int16)
    load_WE = np.array([[1.2, 0.5, 0.1, 0.1, 0.1]])
    space = search_space(np.array([3, 3]), np.ones(2), 5)

    def searched(deadline: float) -> float:
        return improve_exact_balance(
            space, load_WE, np.ones(1), start_GC, Schedule(2_000, 1e-2, 1e-5, deadline),
            Overload(1.0, 1.0), no_transfers(2), random_state(0, 0),
        ).cost

    assert searched(time.time() - 1.0) > searched(np.inf)


@pytest.mark.parametrize(("source", "objective"), [
    (TRACE, "balance"), (TRACE, "time"), (LOADS, "balance"),
])
def test_rebalancing_moves_nothing_that_it_has_no_time_to_judge(
    contiguous: Plan, source: Any, objective: str
) -> None:
    moved = lm.rebalance(contiguous, source, CLUSTER, steps=STEPS, objective=objective,
                         model=MODEL, time_limit_s=PAST)
    assert moved.truncated and moved.moves == ()
    assert np.array_equal(moved.plan.slots, contiguous.slots)


def test_advice_is_judged_on_the_steps_there_is_time_for(contiguous: Plan) -> None:
    told = advise(TRACE, CLUSTER, steps=STEPS, time_limit_s=PAST, current=contiguous)
    assert f"the first {LEAST_STEPS} of them: the time limit left no more" in told.judged_on
    assert told.comparison.steps == LEAST_STEPS
    assert any("time limit fired: auto" in note for note in told.notes)


def test_advice_on_loads_ends_too(contiguous: Plan) -> None:
    told = advise_loads(LOADS, CLUSTER, time_limit_s=PAST, current=contiguous)
    assert told.results["auto"].truncated


def test_steps_are_all_there_are_where_time_allows(contiguous: Plan) -> None:
    def steps(seconds: float | None) -> int | None:
        return steps_in_time(
            {"a": contiguous}, TRACE, CLUSTER, STEPS, None, None, seconds
        )

    assert steps(None) is None and steps(3600.0) is None
    assert steps(0.0) == LEAST_STEPS


@pytest.mark.parametrize("devices", [3, 8])
def test_clusters_keep_a_device_each_when_the_time_is_up(devices: int) -> None:
    """Exact for few devices, a local search for many: either way a permutation in every layer."""
    traffic_LCC = np.random.default_rng(0).random((4, devices, devices))
    weight_GG = 1.0 - np.eye(devices)
    device_LC, proved = place_clusters(traffic_LCC, weight_GG, deadline=time.time() - 1.0)
    assert not proved
    assert (np.sort(device_LC, axis=1) == np.arange(devices)).all()


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_none_is_a_mistake(limit: float, contiguous: Plan) -> None:
    with pytest.raises(UsageError, match=r"time_limit_s .* must be above 0"):
        lm.plan(TRACE, CLUSTER, steps=STEPS, time_limit_s=limit)
    with pytest.raises(UsageError, match=r"time_limit_s .* must be above 0"):
        lm.rebalance(contiguous, TRACE, CLUSTER, steps=STEPS, time_limit_s=limit)
    with pytest.raises(UsageError, match=r"time_limit_s .* must be above 0"):
        TimeLimit.start(limit)
