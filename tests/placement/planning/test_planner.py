"""plan(): valid plans with honest evidence, the same bytes every time, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from loadmaster.errors import InfeasibleError, InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.dispatch.policies import POLICIES
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.placement.planning.planner import METHODS, PlanResult, plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.traces.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K = 2, 8, 2
STEPS = StepSampler(tokens=64, concurrency=8)
CLUSTER = Cluster.preset("h100", devices_per_node=4, slots_per_device=3)
MODEL = ModelSpec(
    name="tiny", num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, hidden=256,
    intermediate=512, other_time_us=100.0,
)
TRACE = synth_trace(
    layers=LAYERS, experts=EXPERTS, top_k=TOP_K, tokens=4000, request_tokens=60, seed=1
)


def quick(
    source: RoutingTrace | Profile = TRACE, cluster: Cluster = CLUSTER, **asked: Any
) -> PlanResult:
    """plan() on the small steps of this file, with little work."""
    return plan(source, cluster, **({"steps": STEPS, "effort": "fast"} | asked))


def assert_sound(result: PlanResult, cluster: Cluster = CLUSTER, layers: int = LAYERS) -> None:
    """What holds of every plan (that every expert has a slot, Plan itself checks)."""
    made, evidence = result.plan, result.evidence
    assert (made.num_layers, made.num_devices) == (layers, cluster.num_devices)
    assert ((made.slots >= 0).sum(axis=2) <= cluster.slots_G).all()
    assert made.evidence == evidence and len(evidence.layers) == layers
    assert 0 < evidence.bound <= evidence.objective
    assert evidence.gap == pytest.approx(evidence.objective / evidence.bound - 1)
    for number, one in enumerate(evidence.layers):
        assert one.bound <= one.objective
        assert one.replicas == (made.slots[number] >= 0).sum() - made.num_experts
    assert evidence.steps


# ---- every method -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_valid_plan_with_evidence(method: str) -> None:
    result = quick(method=method)
    assert_sound(result)
    assert result.plan.provenance.method == method
    assert result.plan.cluster_digest == CLUSTER.digest()
    assert result.plan.provenance.trace_digest == TRACE.digest()
    assert result.evidence.objective_name == "balance"
    assert result.evidence.validation is not None and result.evidence.validation >= 1
    assert not result.truncated
    if not method.startswith("eplb"):
        assert result.plan.duplicates == 0


@pytest.mark.parametrize("traffic", ["return_home/per_expert", "return_home/per_rank", "coherent"])
@pytest.mark.parametrize("dispatch", ["balanced", "sglang_static"])
@pytest.mark.parametrize("sized", [False, True])
def test_auto_is_not_worse_than_any_method_on_the_steps_that_decide(
    traffic: str, dispatch: str, sized: bool
) -> None:
    """Fewer transfers may cost `balance_slack` elsewhere (`benchmarks/field_never_worse.py`)."""
    asked: dict[str, Any] = {"dispatch": dispatch, "balance_slack": 0.0} | (
        {"model": MODEL} if sized else {}
    )
    cluster = CLUSTER.with_traffic(traffic)
    auto = quick(cluster=cluster, **asked).evidence.validation
    assert auto is not None
    for method in METHODS:
        other = quick(cluster=cluster, method=method, **asked).evidence.validation
        assert other is not None and auto <= other * (1 + 1e-4)


def test_auto_on_average_loads_is_not_worse_than_its_plan_for_another_dispatch() -> None:
    """Tokens that are split freely can be split evenly."""
    loads = Profile.from_loads(TRACE.load_LE())
    free, even = quick(loads).evidence, quick(loads, dispatch="even").evidence
    assert free.objective <= even.objective * (1 + 1e-4)


def test_of_plans_that_tie_the_one_with_fewest_replicas_is_kept() -> None:
    """One device holds all tokens evenly whatever it holds; and flat loads need no replica."""
    flat = Profile.from_loads(np.full((LAYERS, EXPERTS), 1000))
    assert quick(flat).plan.spare_slots == 0
    alone = Cluster.preset("h100", devices_per_node=1, slots_per_device=EXPERTS)
    assert quick(cluster=alone).plan.spare_slots == 0


def test_of_plans_that_tie_the_current_one_is_kept() -> None:
    """Another plan as good would have to be sent."""
    flat = Profile.from_loads(np.full((LAYERS, EXPERTS), 1000))
    tight = CLUSTER.with_slots(2)
    current = quick(flat, tight, method="round_robin").plan
    assert quick(flat, tight, current=current).plan.same_slots(current)


@pytest.mark.parametrize("dispatch", sorted(POLICIES))
def test_a_plan_is_made_for_the_dispatch_that_will_run(dispatch: str) -> None:
    result = quick(dispatch=dispatch)
    assert_sound(result)
    assert result.plan.dispatch == DispatchSpec(policy=dispatch)


@pytest.mark.parametrize("dispatch", ["nearest", "sglang_static"])
def test_replicas_that_an_engines_rule_makes_useless_are_left_out(dispatch: str) -> None:
    """In one node SGLang's table sends what is not local to the first replica: others idle."""
    with_spare = quick(dispatch=dispatch).evidence
    without = quick(cluster=CLUSTER.with_slots(2), dispatch=dispatch).evidence
    assert with_spare.validation is not None and without.validation is not None
    assert with_spare.validation <= without.validation + 0.01


def test_slots_left_empty_and_counts_gathered_for_nothing_are_said() -> None:
    tight = quick(cluster=CLUSTER.with_slots(2), model=MODEL)
    assert any("no expert has a replica" in note for note in tight.evidence.notes)


def test_without_spare_slots_every_expert_is_held_once() -> None:
    tight = CLUSTER.with_slots(2)
    result = quick(cluster=tight)
    assert_sound(result, tight)
    assert (result.plan.replicas_LE == 1).all()


def test_one_device_has_nothing_to_balance() -> None:
    alone = Cluster.preset("h100", devices_per_node=1, slots_per_device=EXPERTS)
    result = quick(cluster=alone)
    assert_sound(result, alone)
    assert result.evidence.objective == 1 and result.evidence.gap == 0


# ---- the same answer --------------------------------------------------------------------------


class InOrder:
    """The least an executor must do."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(function, items)


def test_the_same_question_gets_the_same_bytes_on_any_executor() -> None:
    once = quick().plan.to_json()
    assert quick().plan.to_json() == once
    assert quick(executor=InOrder()).plan.to_json() == once
    with ThreadPoolExecutor(2) as pool:
        assert quick(executor=pool).plan.to_json() == once


def test_progress_counts_layers_up_to_the_final_gap() -> None:
    seen: list[tuple[int, int, float]] = []
    result = quick(method="greedy", progress=lambda *now: seen.append(now))
    assert [(done, layers) for done, layers, _ in seen] == [(1, LAYERS), (2, LAYERS)]
    assert seen[-1][2] == pytest.approx(result.evidence.gap)


def test_a_plan_survives_its_file() -> None:
    made = quick(method="greedy").plan
    again = Plan.from_json(made.to_json())
    assert made.same_slots(again) and again.evidence == made.evidence
    assert again.provenance == made.provenance


def test_a_time_limit_cuts_the_search_short_and_the_plan_is_sound_all_the_same() -> None:
    result = quick(time_limit_s=1e-9)
    assert result.truncated
    assert_sound(result)


# ---- traces at the edge -----------------------------------------------------------------------


def requests_of(tokens: int) -> npt.NDArray[np.int64]:
    return np.arange(tokens) // 50


def test_one_expert_with_all_the_load_is_copied_to_every_device() -> None:
    ids = np.zeros((1500, 1, 1), np.int64)
    hot = RoutingTrace.from_arrays(ids, num_experts=4, request=requests_of(1500))
    roomy = Cluster.preset("h100", devices_per_node=4, slots_per_device=2)
    result = quick(hot, roomy)
    assert_sound(result, roomy, layers=1)
    assert result.plan.replicas_LE[0, 0] == 4
    assert result.evidence.objective == pytest.approx(1)


def test_one_expert_with_all_the_load_and_no_spare_slot_meets_its_bound() -> None:
    ids = np.zeros((1500, 1, 1), np.int64)
    hot = RoutingTrace.from_arrays(ids, num_experts=4, request=requests_of(1500))
    tight = Cluster.preset("h100", devices_per_node=4, slots_per_device=1)
    result = quick(hot, tight)
    assert_sound(result, tight, layers=1)
    assert result.evidence.objective == pytest.approx(4) and result.evidence.gap < 1e-9


def test_a_layer_nobody_used_is_placed_and_remarked_on() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (1500, 2, 1))
    k_of_token = np.tile(np.array([1, 0], np.uint8), (1500, 1))
    trace = RoutingTrace.from_arrays(
        ids, num_experts=4, k_of_token=k_of_token, request=requests_of(1500)
    )
    small = Cluster.preset("h100", devices_per_node=2, slots_per_device=3)
    result = quick(trace, small)
    assert_sound(result, small)
    assert result.evidence.layers[1].objective == 1
    assert any("no token used layer 1" in note for note in result.evidence.notes)


def test_faster_devices_get_more_of_the_tokens() -> None:
    mixed = Cluster.preset(
        "h100", devices_per_node=4, slots_per_device=3, speeds=[1.0, 1.0, 2.0, 2.0]
    )
    result = quick(cluster=mixed)
    assert_sound(result, mixed)
    blind = evaluate(quick(method="round_robin").plan, TRACE, mixed, steps=STEPS)
    assert evaluate(result.plan, TRACE, mixed, steps=STEPS).imbalance_mean < blind.imbalance_mean


def test_the_busiest_expert_goes_to_the_fastest_device() -> None:
    """Two experts, one slot each: max/mean scores 2 for all tokens on either, so it cannot say."""
    uneven = Cluster.preset("h100", devices_per_node=2, slots_per_device=1, speeds=[1.0, 4.0])
    hot = RoutingTrace.from_arrays(
        np.zeros((1500, 1, 1), np.int64), num_experts=2, request=requests_of(1500)
    )
    result = quick(hot, uneven)
    assert result.plan.slots[0, :, 0].tolist() == [1, 0]
    assert result.evidence.objective == pytest.approx(5 / 4) and result.evidence.gap < 1e-9


@pytest.mark.parametrize("method", ["contiguous", "greedy", "auto"])
def test_loads_alone_are_enough_for_balance(method: str) -> None:
    loads = Profile.from_loads(TRACE.load_LE(), top_k=TOP_K)
    result = quick(loads, method=method)
    assert_sound(result)
    assert result.evidence.validation is None
    assert any("planned for load only" in note for note in result.evidence.notes)


def test_loads_alone_cannot_tell_time() -> None:
    loads = Profile.from_loads(TRACE.load_LE(), top_k=TOP_K)
    with pytest.raises(UsageError, match="average loads cannot tell time"):
        quick(loads, model=MODEL, objective="time")


def test_a_profile_with_a_sample_is_planned_on_its_tokens() -> None:
    profile = Profile.from_trace(TRACE)
    result = quick(profile, method="greedy")
    assert_sound(result)
    assert result.evidence.validation is not None


def test_a_trace_shorter_than_one_step_is_refused() -> None:
    with pytest.raises(InputError, match="do not fill one step"):
        quick(TRACE.select(np.arange(40)))


# ---- time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["greedy", "auto"])
def test_with_a_model_the_objective_is_time_in_microseconds(method: str) -> None:
    result = quick(model=MODEL, method=method)
    assert_sound(result)
    evidence = result.evidence
    assert evidence.objective_name == "time"
    assert evidence.objective == pytest.approx(
        sum(x.objective for x in evidence.layers) + MODEL.other_time_us
    )
    assert evidence.bound == pytest.approx(
        sum(x.bound for x in evidence.layers) + MODEL.other_time_us
    )
    assert result.plan.model_digest == MODEL.digest()


def test_searching_for_time_is_not_slower_than_greedy() -> None:
    searched = quick(model=MODEL).evidence.objective
    assert searched <= quick(model=MODEL, method="greedy").evidence.objective * (1 + 1e-9)


def test_balance_can_be_asked_for_beside_a_model() -> None:
    assert quick(model=MODEL, objective="balance").evidence.objective_name == "balance"


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "said"), [
    ({"seed": -1}, "seed -1 must be at least 0"),
    ({"method": "luck"}, "unknown method 'luck'"),
    ({"objective": "fame"}, "unknown objective 'fame'"),
    ({"effort": "heroic"}, "unknown effort 'heroic'"),
    ({"dispatch": "telepathy"}, "telepathy"),
    ({"dispatch": DispatchSpec(policy="telepathy")}, "telepathy"),
    ({"objective": "time"}, "needs the model"),
    ({"balance_slack": 1.0}, "balance_slack"),
    ({"balance_slack": -0.1}, "balance_slack"),
    ({"time_limit_s": 0.0}, "time_limit_s"),
])
def test_options_that_mean_nothing_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        quick(**asked)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_slots_are_infeasible_whatever_the_method(method: str) -> None:
    with pytest.raises(InfeasibleError, match="4 slots short"):
        quick(cluster=CLUSTER.with_slots(1), method=method)


def test_a_model_of_another_shape_is_refused() -> None:
    other = MODEL.model_copy(update={"num_layers": 3})
    with pytest.raises(InputError, match="do not belong together"):
        quick(model=other)


def test_a_current_plan_of_another_shape_is_refused() -> None:
    other = Plan(np.arange(EXPERTS).reshape(1, 4, 2), num_experts=EXPERTS)
    with pytest.raises(InputError, match="the current plan has 1 layers"):
        quick(current=other)


def test_a_current_plan_over_the_clusters_slots_is_refused() -> None:
    current_plan = quick(method="greedy").plan
    with pytest.raises(InputError, match="the current plan fills 3 slots of device 0 in layer 0"):
        quick(cluster=CLUSTER.with_slots(2), current=current_plan)


def test_a_current_plan_is_one_more_candidate() -> None:
    """Better than a search cut short would find; nothing worse may come back for it."""
    current_plan = quick(effort="thorough", balance_slack=0.0)
    kept = quick(current=current_plan.plan, time_limit_s=1e-9, balance_slack=0.0)
    assert_sound(kept)
    assert kept.evidence.validation is not None and current_plan.evidence.validation is not None
    assert kept.evidence.validation <= current_plan.evidence.validation + 1e-9
