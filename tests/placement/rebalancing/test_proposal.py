"""What a control loop thinks: which traffic counts, whether a switch pays, what is remembered."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from loadmaster.errors import UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.comparison.compare import compare
from loadmaster.placement.cost.overlap import Overlap
from loadmaster.placement.hardware import ComputeProfile
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.placement.rebalancing.policy import Policy
from loadmaster.placement.rebalancing.proposal import (
    CandidateSearch,
    LoopMemory,
    Prices,
    Promise,
    Proposal,
    Situation,
    SwitchPrice,
    alike_windows,
    propose,
    settle,
    unsteadiness,
)
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import DECODE, PREFILL, RoutingTrace

LAYERS, DEVICES, EXPERTS, TOP_K = 2, 4, 8, 2
MODEL = ModelSpec(
    num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, hidden=64, intermediate=32
)
TOKEN_US = 2.0            # an expert's work on a token; what else a step takes is little
CPU = Cluster.preset("cpu", devices_per_node=DEVICES, slots_per_device=3)
CLUSTER = CPU.model_copy(update={"hardware": CPU.hardware.model_copy(update={
    "compute": ComputeProfile(
        start_us=20.0, active_expert_us=5.0, hbm_bytes_per_s=1e30,
        flops_per_s=MODEL.flops_per_assignment / TOKEN_US * 1e6,
    ),
})})
STEPS = StepSampler(tokens=256, concurrency=16)
SEARCH = CandidateSearch(steps=STEPS, max_moves=8)
EAGER = Policy("net_benefit", every_steps=10, fewest_tokens=100, horizon_steps=1e6)
FREE = Prices(lambda plan: SwitchPrice(5, 10.0, 0.0), lambda: 0.0, looking_is_felt=False)


def window(hot: list[int], seed: int, requests: int = 32) -> RoutingTrace:
    """Requests of 64 tokens that prefer these experts."""
    rng = np.random.default_rng(seed)
    share = np.ones(EXPERTS)
    share[hot] = 8.0
    noise = rng.gumbel(size=(requests * 64, LAYERS, EXPERTS))
    ids = np.argsort(-(np.log(share) + noise), axis=2)[:, :, :TOP_K]
    request = 1000 * seed + np.arange(requests * 64) // 64
    return RoutingTrace.from_arrays(ids, num_experts=EXPERTS, request=request)


def in_order() -> Plan:
    slots = np.arange(EXPERTS).reshape(DEVICES, 2)
    return Plan(np.tile(slots, (LAYERS, 1, 1)).astype(np.int16), EXPERTS)


def here(step: int = 10, **changes: object) -> Situation:
    return dataclasses.replace(
        Situation(step, in_order(), CLUSTER, MODEL), **changes  # type: ignore[arg-type]
    )


def memory(*windows: RoutingTrace) -> LoopMemory:
    """A loop's, after these windows."""
    found = LoopMemory()
    for seen in windows:
        found = found.saw(seen, seen.num_tokens, kept=4)
    return found


CROWDED, SPREAD = [0, 1], [0, 2, 4, 6]      # all on device 0; one on each


# ---- which traffic -----------------------------------------------------------------------------


def test_older_windows_of_other_traffic_are_left_out() -> None:
    old, same, new = window(SPREAD, 1), window(CROWDED, 2), window(CROWDED, 3)
    assert alike_windows((old, same, new), None, 0) == (same, new)
    assert alike_windows((new,), None, 0) == (new,)
    assert alike_windows((), None, 0) == ()


def test_windows_too_small_to_tell_apart_are_pooled() -> None:
    old, new = window(SPREAD, 1, requests=3), window(CROWDED, 2, requests=3)
    assert alike_windows((old, new), None, 0) == (old, new)


def test_a_phase_is_compared_by_its_own_tokens() -> None:
    """Prefill stays as it was while decode moves away."""

    def phased(decode: list[int], seed: int) -> RoutingTrace:
        prefill, other = window(SPREAD, seed), window(decode, seed + 100)
        ids = np.concatenate([prefill.ids, other.ids])
        phase = np.repeat([PREFILL, DECODE], prefill.num_tokens)
        request = np.concatenate([prefill.request_T(), other.request_T()])
        return RoutingTrace.from_arrays(ids, num_experts=EXPERTS, request=request, phase=phase)

    old, new = phased(SPREAD, 1), phased(CROWDED, 2)
    assert alike_windows((old, new), PREFILL, 0) == (old, new)
    assert alike_windows((old, new), DECODE, 0) == (new,)
    assert alike_windows((old, new), None, 0) == (new,)


def test_the_gain_is_that_of_the_newest_traffic() -> None:
    """Old windows that crowd nothing would water it down."""
    alone = propose(memory(window(CROWDED, 3)), here(), EAGER, SEARCH, FREE)
    after = propose(
        memory(window(SPREAD, 1), window(SPREAD, 2), window(CROWDED, 3)), here(), EAGER, SEARCH,
        FREE,
    )
    assert alone.answer == after.answer == "apply"
    assert after.numbers["gain_us"] == alone.numbers["gain_us"] > 0
    assert after.numbers["windows"] == 1 and after.numbers["drift_bits"] > 0.05
    assert after.made_for is not None
    assert after.made_for.digest() == window(CROWDED, 3).digest()


def test_judging_requests_are_none_of_those_planned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, RoutingTrace] = {}
    from loadmaster.placement.rebalancing import proposal

    def plans(current: Plan, traffic: RoutingTrace, *given: object, **options: object) -> object:
        parts["planning"] = traffic
        return real_rebalance(current, traffic, *given, **options)  # type: ignore[arg-type]

    def judges(table: object, traffic: RoutingTrace, *given: object, **options: object) -> object:
        parts["judging"] = traffic
        return compare(table, traffic, *given, **options)  # type: ignore[arg-type]

    real_rebalance = proposal.rebalance
    monkeypatch.setattr(proposal, "rebalance", plans)
    monkeypatch.setattr(proposal, "compare", judges)
    both = window(CROWDED, 1), window(CROWDED, 2)
    propose(memory(*both), here(), EAGER, SEARCH, FREE)
    planned, judged = (set(parts[k].request_T().tolist()) for k in ("planning", "judging"))
    assert not planned & judged
    assert planned | judged == {r for w in both for r in w.request_T().tolist()}
    assert len(planned) == len(judged)


# ---- the decision ------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_decision() -> None:
    first, second = (
        propose(memory(window(CROWDED, 3)), here(), EAGER, SEARCH, FREE) for _ in range(2)
    )
    assert first.numbers == second.numbers and first.reason == second.reason
    assert first.plan is not None and second.plan is not None
    assert first.plan.same_slots(second.plan)


def test_a_switch_pays_for_moving_and_for_looking_where_that_is_felt() -> None:
    seen = memory(window(CROWDED, 3))
    gain = propose(seen, here(), EAGER, SEARCH, FREE).numbers["gain_low_us"]
    near = dataclasses.replace(EAGER, horizon_steps=100)

    def answer(move_us: float, looking_us: float, felt: bool) -> Proposal:
        prices = Prices(lambda plan: SwitchPrice(5, 10.0, move_us), lambda: looking_us, felt)
        return propose(seen, here(), near, SEARCH, prices)

    assert answer(99 * gain, 0.0, True).answer == "apply"
    assert answer(101 * gain, 0.0, True).answer == "leave it"
    assert answer(50 * gain, 51 * gain, False).answer == "apply"
    dear = answer(50 * gain, 51 * gain, True)
    assert dear.answer == "leave it" and "pays back after" in dear.reason
    assert dear.numbers["cost_us"] == pytest.approx(101 * gain)
    assert dear.plan is not None and dear.looked, "left alone, but found"


def test_what_looking_took_until_the_candidate_is_planning() -> None:
    readings = iter([100.0, 350.0, 400.0])
    prices = Prices(lambda plan: SwitchPrice(5, 10.0, 0.0), lambda: next(readings), True)
    numbers = propose(memory(window(CROWDED, 3)), here(), EAGER, SEARCH, prices).numbers
    assert (numbers["planning_us"], numbers["looking_us"]) == (250.0, 400.0)


@pytest.mark.parametrize(("seen", "situation", "reason", "looked"), [
    (window(CROWDED, 1, requests=1), here(), "tokens since the last switch", False),
    (window(CROWDED, 3), here(unknown_times="no steps yet"), "no steps yet", False),
    (window(CROWDED, 1, requests=6), here(), "do not fill one step", True),
])
def test_too_little_is_said_to_be_too_little(
    seen: RoutingTrace, situation: Situation, reason: str, looked: bool
) -> None:
    found = propose(memory(seen), situation, EAGER, SEARCH, FREE)
    assert found.answer == "not enough data" and reason in found.reason
    assert found.looked == looked and found.plan is None


def test_what_cannot_be_is_said_and_a_search_that_means_nothing_is_refused() -> None:
    seen = memory(window(CROWDED, 3))
    lost = here(lost=frozenset({0, 1, 2}))      # one device is left, with 3 slots for 8 experts
    found = propose(seen, lost, EAGER, SEARCH, FREE)
    assert found.answer == "cannot" and "slots" in found.reason and found.looked
    unknown = dataclasses.replace(SEARCH, candidates="replan", method="luck")
    with pytest.raises(UsageError, match="luck"):
        propose(seen, here(), EAGER, unknown, FREE)


def test_lost_devices_get_nothing() -> None:
    current = in_order()
    slots = np.full((LAYERS, DEVICES, 3), -1, np.int16)
    slots[:, 0], slots[:, 2], slots[:, 3, :2] = [0, 1, 2], [3, 4, 5], [6, 7]
    now = here(current=dataclasses.replace(current, slots=slots), lost=frozenset({1}))
    search = dataclasses.replace(SEARCH, candidates="replan", method="lpt_swap")
    found = propose(memory(window([0, 1, 2], 3)), now, EAGER, search, FREE)
    assert found.plan is not None and (found.plan.slots[:, 1] == -1).all()


def test_the_dispatch_and_overlap_that_run_are_those_judged_under() -> None:
    """Numbers of `compare` with the same, on the half that judges."""
    seen = window(CROWDED, 3)
    _, judging = seen.split(0.5, seed=SEARCH.seed)
    runs = {"dispatch": DispatchSpec(policy="even"), "overlap": Overlap("two_batch")}
    found = propose(memory(seen), here(**runs), EAGER, SEARCH, FREE)
    assert found.plan is not None and found.plan.dispatch == runs["dispatch"]
    table = compare(
        {"now": in_order()}, judging, CLUSTER, steps=STEPS, model=MODEL, **runs  # type: ignore[arg-type]
    )
    assert found.numbers["step_now_us"] == pytest.approx(table.row("now").metric)


# ---- whether it was worth it -------------------------------------------------------------------


@pytest.mark.parametrize(("measured_us", "kept"), [
    (80.0, True), (100.0, True), (102.9, True), (103.1, False), (150.0, False),
])
def test_a_switch_stays_unless_it_is_worse_beyond_doubt(measured_us: float, kept: bool) -> None:
    """Worse by 1 % is borne, and 2 % is how far the times may be off."""
    promise = Promise(before=in_order(), epoch=2, gain_us=25.0, error=0.02)
    found = settle(promise, measured_us, 100.0, worse_by=0.01)
    assert found.kept == kept
    assert found.numbers["promised_gain_us"] == 25.0
    assert found.numbers["realised_gain_us"] == pytest.approx(100.0 - measured_us)
    assert ("25 were promised" in found.reason) != kept


def test_a_few_steps_judge_no_switch_unless_a_window_has_no_more() -> None:
    promise = Promise(before=in_order(), epoch=2, gain_us=25.0, error=0.0)
    assert not promise.can_be_judged(5, window_steps=32) and promise.can_be_judged(6, 32)
    assert promise.can_be_judged(4, window_steps=4) and not promise.can_be_judged(3, 4)


def test_a_steady_machine_is_steady_at_any_speed() -> None:
    assert unsteadiness([1.7, 1.7, 1.7]) == 0.0 == unsteadiness([1.7])
    assert unsteadiness([1.0, 1.1]) == pytest.approx(np.log(1.1))


# ---- memory ------------------------------------------------------------------------------------


def test_memory_keeps_the_last_windows_until_a_switch() -> None:
    a, b, c = (window(SPREAD, seed) for seed in range(3))
    found = LoopMemory()
    for seen in (a, b, c):
        found = found.saw(seen, 100, kept=2)
    assert found.windows == (b, c) and found.planned_for is a
    assert found.tokens_since_switch == 300
    switched = found.looked(70).switched(c)
    assert switched.windows == () and switched.planned_for is c
    assert (switched.tokens_since_switch, switched.last_look_step) == (0, 70)


def test_switches_undone_in_a_row_are_counted_until_one_is_confirmed() -> None:
    found = memory(window(SPREAD, 1)).undone(40).undone(80)
    assert (found.rollbacks, found.last_look_step, found.windows) == (2, 80, ())
    assert found.confirmed().rollbacks == 0


def test_other_devices_forget_traffic_but_not_the_back_off() -> None:
    found = memory(window(SPREAD, 1)).undone(40).saw(window(SPREAD, 2), 50, kept=2)
    after = found.other_devices()
    assert after == LoopMemory(last_look_step=40, rollbacks=1)


def test_a_window_without_tokens_is_none() -> None:
    empty = window(SPREAD, 1).select(np.zeros(0, int))
    assert LoopMemory().saw(empty, 0, kept=2) == LoopMemory()
