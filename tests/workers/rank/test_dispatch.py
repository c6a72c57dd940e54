"""Live ranks choose the slots that the planner counted on, assignment by assignment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.dispatch.policies import POLICIES
from loadmaster.placement.dispatch.quotas import route
from loadmaster.placement.dispatch.token_limit import CapacityRule, apply_capacity
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.traces.steps import StepSampler
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.group.group import Group
from loadmaster.workers.protocol.phase_plans import PhasePlans, Tables
from loadmaster.workers.protocol.plan_switch import check_plans
from loadmaster.workers.protocol.settings import SERVED_TRAFFIC, served_spec
from loadmaster.workers.rank import token_limit
from loadmaster.workers.rank.dispatch import LiveDispatch
from loadmaster.workers.rank.exchange import Exchange

Array = npt.NDArray[Any]
Start = Callable[..., Coordinator]
Make = Callable[..., Any]
distributed: Any = torch.distributed
RANKS = 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Exchange]]:
    """The exchanges of four ranks that are threads."""
    store = distributed.HashStore()
    made = together([
        partial(Exchange, store, g, RANKS, timeout_s=10.0) for g in range(RANKS)
    ])
    yield made
    for exchange in made:
        exchange.close()


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run one function per rank at the same time."""
    with ThreadPoolExecutor(len(functions)) as threads:
        return [answer.result() for answer in [threads.submit(f) for f in functions]]


def random_plan(rng: np.random.Generator, policy: str) -> Plan:
    """One layer: spare slots at random, some empty, some a second replica on the same rank."""
    experts = int(rng.integers(2, 17))
    width = -(-experts // RANKS) + int(rng.integers(0, 4))
    spare = rng.integers(-1, experts, RANKS * width - experts)
    slots = rng.permutation(np.r_[np.arange(experts), spare]).reshape(1, RANKS, width)
    parameters: dict[str, float | str] = {}
    if policy == "balanced" and rng.random() < 0.5:
        parameters = {"slack": float(rng.choice([0.0, 0.1, 1.0]))}
    return Plan(
        slots=slots.astype(np.int16), num_experts=experts,
        dispatch=DispatchSpec(policy=policy, parameters=parameters),
    )


def random_step(rng: np.random.Generator, experts: int) -> tuple[Array, Array]:
    """(ids [T, K] of a skewed router with choices left out, home [T]); ranks may have no token."""
    tokens, choices = int(rng.integers(0, 120)), int(rng.integers(1, min(8, experts) + 1))
    taste = rng.normal(0, 1.5, experts) + rng.gumbel(size=(tokens, experts))
    ids = np.argsort(-taste, axis=1)[:, :choices].astype(np.int64)
    ids[rng.random(ids.shape) < 0.03] = -1
    return ids, rng.choice(RANKS, tokens, p=rng.dirichlet(np.ones(RANKS)))


def random_cluster(rng: np.random.Generator, traffic: str) -> Cluster:
    nodes = int(rng.choice([1, 2]))
    return Cluster.preset(
        "cpu", nodes=nodes, devices_per_node=RANKS // nodes, slots_per_device=8, traffic=traffic,
        speeds=rng.choice([0.5, 1.0], RANKS).tolist() if rng.random() < 0.3 else None,
    )


@pytest.mark.parametrize("traffic", SERVED_TRAFFIC)
@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_take_the_planners_slots(ranks: list[Exchange], policy: str, traffic: str) -> None:
    """Random plans, steps and clusters, for every policy and payload that is offered live."""
    rng = np.random.default_rng(sorted(POLICIES).index(policy))
    for case in range(12):
        plan, cluster = random_plan(rng, policy), random_cluster(rng, traffic)
        ids, home = random_step(rng, plan.num_experts)
        tables = Tables.of(plan, epoch=case + 1)
        live = [LiveDispatch(exchange, tables, cluster) for exchange in ranks]
        found = together([
            partial(one.assign, 0, 0, case, torch.from_numpy(ids[home == g]))
            for g, one in enumerate(live)
        ])
        planned = route(ids, home, plan.slots[0], cluster, plan.dispatch, plan.num_experts)
        sent = np.zeros((RANKS, plan.slots[0].size), int)
        for g, dispatched in enumerate(found):
            assert np.array_equal(dispatched.slot_TK.numpy(), planned[home == g])
            np.add.at(sent[g], planned[home == g][ids[home == g] >= 0], 1)
        assert all(np.array_equal(d.quota_GS, sent) for d in found)


def limited_layer(
    exchange: Exchange, live: LiveDispatch, rule: CapacityRule, slots_GC: Array,
    ids: torch.Tensor, gates: torch.Tensor, score: torch.Tensor,
) -> tuple[Array, Array]:
    """(ids kept, their slots) of one rank's tokens, as its expert layer finds them."""
    kept = token_limit.limit(exchange, rule, ids, gates, score, slots_GC, score.shape[1])
    return kept.ids_TK.numpy(), live.assign(0, 0, 0, kept.ids_TK).slot_TK.numpy()


@pytest.mark.parametrize("rule", [CapacityRule("drop", 0.7), CapacityRule("reroute", 0.7),
                                  CapacityRule("drop", 0.7, "device")])
@pytest.mark.parametrize("traffic", SERVED_TRAFFIC)
def test_what_a_capacity_rule_keeps_takes_the_planners_slots(
    ranks: list[Exchange], traffic: str, rule: CapacityRule
) -> None:
    """The rule sees the whole step in home order; dispatch sees what it kept."""
    rng = np.random.default_rng(7)
    for case in range(5):
        plan, cluster = random_plan(rng, "balanced"), random_cluster(rng, traffic)
        experts, slots_GC = plan.num_experts, plan.slots[0]
        ids, home = random_step(rng, experts)
        home = np.sort(home)
        score = rng.dirichlet(np.ones(experts), len(ids)).astype(np.float32)
        gates = np.where(ids >= 0, np.take_along_axis(score, np.maximum(ids, 0), axis=1), 0)
        tables = Tables.of(plan, case)
        found = together([
            partial(
                limited_layer, exchange, LiveDispatch(exchange, tables, cluster), rule, slots_GC,
                *(torch.from_numpy(x[home == g]) for x in (ids, gates, score)),
            )
            for g, exchange in enumerate(ranks)
        ])
        holds = np.stack([np.isin(np.arange(experts), row) for row in slots_GC])
        want = apply_capacity(
            ids, gates, experts, rule, score_TE=score, home_T=home, holds_GE=holds
        )
        planned = route(want.ids_TK, home, slots_GC, cluster, plan.dispatch, experts)
        assert np.array_equal(np.concatenate([kept for kept, _ in found]), want.ids_TK)
        assert np.array_equal(np.concatenate([slots for _, slots in found]), planned)


def test_an_expert_past_the_plans_is_refused(ranks: list[Exchange]) -> None:
    plan = Plan(slots=np.array([[[0], [1], [0], [1]]], np.int16), num_experts=2)
    cluster = Cluster.preset("cpu", devices_per_node=RANKS, slots_per_device=1)
    live = LiveDispatch(ranks[0], Tables.of(plan, 1), cluster)
    with pytest.raises(InputError, match="layer 0: a token chose expert 2 of 2"):
        live.assign(0, 0, 0, torch.tensor([[2]]))


@pytest.mark.parametrize(("policy", "payload"), [
    ("balanced", "per_rank"), ("balanced", "per_expert"), ("fewest_active", "per_rank"),
    ("vllm_hash", "per_expert"), ("trtllm_round_robin", "per_rank"),
])
def test_recorded_transfers_are_those_predicted_for_the_same_steps(
    start_threads: Start, checkpoint: Callable[[str], Path], shuffled_plan: Make,
    random_prompts: Make, serve: Make, policy: str, payload: str,
) -> None:
    """A group of four ranks; its recorded steps replayed, as the controller predicts them."""
    directory = checkpoint("qwen3_moe")
    plan = shuffled_plan(served_spec(directory, "bfloat16"), 3, spare=3, dispatch=policy)
    group = start_threads(directory, plan, payload=payload)
    group.configure(recording=True)
    serve(group, random_prompts(4, 9, longest=50), 5)
    trace, measured, cluster = group.trace(), group.measurements(), group.status()["cluster"]
    recorded = StepSampler(order="recorded")
    loads = step_loads(trace, recorded.sample(trace), plan, cluster)
    assert measured.remote_transfers.sum() > 0 and measured.tokens.sum() > 0
    assert np.array_equal(loads.tokens_WLG, measured.tokens)
    assert np.array_equal(loads.nvlink_out_WLG, measured.remote_transfers)
    judged = evaluate(plan, trace, cluster, steps=recorded)
    tokens = measured.rows.sum() * plan.num_layers
    assert judged.remote_device_copies_per_token == pytest.approx(
        measured.remote_transfers.sum() / tokens, rel=1e-12
    )


# ---- what is not served ---------------------------------------------------------------------


def test_a_policy_that_means_nothing_is_refused_before_it_is_served(
    checkpoint: Callable[[str], Path], shuffled_plan: Make
) -> None:
    spec = served_spec(checkpoint("qwen3_moe"), "bfloat16")
    plans = PhasePlans.both(shuffled_plan(spec, 0))
    for dispatch, message in (
        (DispatchSpec(policy="best"), "unknown dispatch 'best'"),
        (DispatchSpec(parameters={"slack": -1.0}), "slack -1.0 is too small"),
    ):
        wanted = Plan(slots=plans.prefill.slots, num_experts=spec.num_experts, dispatch=dispatch)
        with pytest.raises(UsageError, match=message):
            check_plans(PhasePlans.both(wanted), plans, spec)


def test_traffic_that_ranks_do_not_speak_is_refused(checkpoint: Callable[[str], Path]) -> None:
    """Whether it is asked for or comes with the cluster; and a cluster of another size."""
    model = checkpoint("qwen3_moe")
    described = Cluster.preset(
        "cpu", devices_per_node=2, slots_per_device=4, traffic="return_home/per_node"
    )
    for options in ({"traffic": "return_home/per_node"}, {"cluster": described}):
        with pytest.raises(UsageError, match="serve return_home/per_expert and return_home/per_r"):
            Group.start(model, ranks=2, name="nodes", **options)
    with pytest.raises(UsageError, match="the cluster has 2 devices, the group has 3 ranks"):
        Group.start(
            model, ranks=3, name="size", cluster=described, traffic="return_home/per_rank"
        )
