"""What crosses which port, counted again token by token in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.max_min_rates import fair_transfers_WX
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.dispatch.quotas import route
from loadmaster.placement.hardware import ComputeProfile
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.traces.steps import Steps
from loadmaster.traces.trace import RoutingTrace

PORT_NAMES = ("nvlink_out", "nvlink_in", "nic_out", "nic_in")
MODES = ("return_home/per_expert", "return_home/per_rank", "return_home/per_node", "allgather")


def place(traffic: str, nodes: int = 2, per_node: int = 2, slots: int = 3) -> Cluster:
    return Cluster.preset("h100", nodes=nodes, devices_per_node=per_node, slots_per_device=slots,
                          traffic=traffic)


def random_case(
    seed: int, devices: int = 4, layers: int = 2, ragged: bool = False
) -> tuple[RoutingTrace, Steps, Plan]:
    rng = np.random.default_rng(seed)
    ids = np.stack([
        np.stack([rng.permutation(8)[:3] for _ in range(layers)]) for _ in range(60)
    ])
    k = rng.integers(0, 4, (60, layers)) if ragged else None
    trace = RoutingTrace.from_arrays(
        ids, num_experts=8, k_of_token=k, source=rng.integers(0, devices, 60)
    )
    slots = np.stack([
        rng.permutation(np.r_[np.arange(8), rng.integers(-1, 8, devices * 3 - 8)])
        .reshape(devices, 3) for _ in range(layers)
    ])
    steps = Steps(rng.permutation(60).astype(np.int64), np.array([0, 20, 45, 60]))
    return trace, steps, Plan(slots=slots, num_experts=8)


def by_hand(
    slot_TK: np.ndarray, home_T: np.ndarray, cluster: Cluster, width: int
) -> dict[str, np.ndarray]:
    """Transfers per port, and `far` [G, G] from device to device between nodes, of one step under
    the cluster's payload, one token after the other."""
    devices, node = cluster.num_devices, cluster.node_G
    ports = {n: np.zeros(devices) for n in PORT_NAMES} | {"far": np.zeros((devices,) * 2)}
    per_node = devices // cluster.num_nodes

    def send(source: int, to: int) -> None:
        if source != to:
            kind = "nvlink" if node[source] == node[to] else "nic"
            ports[f"{kind}_out"][source] += 1
            ports[f"{kind}_in"][to] += 1
            ports["far"][source, to] += kind == "nic"

    for row, home in zip(slot_TK, home_T, strict=True):
        ranks = [int(s) // width for s in row if s >= 0]
        if cluster.traffic.mode == "allgather":
            ranks = list(range(devices))
        if str(cluster.traffic) == "return_home/per_expert":
            for rank in ranks:
                send(home, rank)
        elif str(cluster.traffic) == "return_home/per_rank":
            for rank in sorted(set(ranks)):
                send(home, rank)
        else:
            for rank in sorted(set(ranks)):
                twin = node[rank] * per_node + home % per_node    # same place in that node
                send(home if node[rank] == node[home] else twin, rank)
            for n in sorted({int(node[r]) for r in ranks} - {int(node[home])}):
                send(home, n * per_node + home % per_node)
    return ports


@pytest.mark.parametrize("traffic", MODES[:3])
@pytest.mark.parametrize("policy", ["even", "balanced", "vllm_hash"])
@pytest.mark.parametrize("ragged", [False, True])
def test_ports_are_what_the_tokens_send(traffic: str, policy: str, ragged: bool) -> None:
    cluster = place(traffic)
    trace, steps, plan = random_case(7, ragged=ragged)
    spec = DispatchSpec(policy=policy)
    loads = step_loads(trace, steps, plan, cluster, spec)
    for w in range(3):
        taken = steps.tokens_of(w)
        home = trace.home_rank_T(4)[taken]
        for layer in range(2):
            ids = trace.ids[taken, layer].astype(int)
            if trace.k_of_token is not None:
                ids[np.arange(3) >= trace.k_of_token[taken, layer][:, None]] = -1
            slot_TK = route(ids, home, plan.slots[layer], cluster, spec, 8)
            expected = by_hand(slot_TK, home, cluster, 3)
            for name in PORT_NAMES:
                counted = getattr(loads, f"{name}_WLG")[w, layer]
                assert np.array_equal(counted, expected[name]), name
            fair_X = fair_transfers_WX(expected["far"][None], cluster)[0]
            assert loads.fair_transfers_WLX is not None
            assert loads.fair_transfers_WLX[w, layer].tolist() == fair_X.tolist()
            used = np.bincount(slot_TK[slot_TK >= 0], minlength=12).reshape(4, 3)
            assert np.array_equal(loads.tokens_WLG[w, layer], used.sum(axis=1))
            assert np.array_equal(loads.active_WLG[w, layer], (used > 0).sum(axis=1))


def test_steps_counted_in_parts_are_counted_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of devices are counted a few steps at a time, here one."""
    cluster = place("return_home/per_node")
    trace, steps, plan = random_case(11)
    whole = step_loads(trace, steps, plan, cluster)
    monkeypatch.setattr("loadmaster.placement.cost.count_traffic.PAIRS_AT_ONCE", 16)
    parts = step_loads(trace, steps, plan, cluster)
    for name in (*(f"{n}_WLG" for n in PORT_NAMES), "fair_transfers_WLX"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name)), name


def test_allgather_enters_each_node_once_and_fans_out_there() -> None:
    """By hand the NIC load falls on the home's twin; in the sum per node it is the same."""
    cluster = place("allgather")
    trace, steps, plan = random_case(3)
    loads = step_loads(trace, steps, plan, cluster, DispatchSpec())
    for w in range(3):
        home = trace.home_rank_T(4)[steps.tokens_of(w)]
        expected = by_hand(np.zeros((len(home), 1), int), home, cluster, 3)
        for name in PORT_NAMES:
            ours = getattr(loads, f"{name}_WLG")[w, 0].reshape(2, 2).sum(axis=1)
            assert np.allclose(ours, expected[name].reshape(2, 2).sum(axis=1)), name
        own_G = np.bincount(home, minlength=4)
        far_GG = np.kron([[0, 1], [1, 0]], np.ones((2, 2))) * own_G[:, None] / 2
        assert loads.fair_transfers_WLX is not None
        fair_X = fair_transfers_WX(far_GG[None], cluster)[0]
        assert np.allclose(loads.fair_transfers_WLX[w, 0], fair_X)
    other = Plan(slots=plan.slots[:, ::-1], num_experts=8)
    again = step_loads(trace, steps, other, cluster, DispatchSpec())
    assert np.array_equal(loads.nic_in_WLG, again.nic_in_WLG)      # routing plays no part


def test_coherent_counts_pairs_of_successive_experts() -> None:
    cluster = place("coherent")
    trace, steps, plan = random_case(5, layers=3)
    loads = step_loads(trace, steps, plan, cluster, DispatchSpec(policy="even"))
    node = cluster.node_G
    for w in range(3):
        taken = steps.tokens_of(w)
        home = trace.home_rank_T(4)[taken].astype(int)
        before = home[:, None]
        for layer in range(3):
            slot_TK = route(trace.ids[taken, layer].astype(int), home, plan.slots[layer], cluster,
                            DispatchSpec(policy="even"), 8)
            after = slot_TK // 3
            pairs = [(a, b) for x, y in zip(before, after, strict=True) for a in x for b in y
                     if a != b]
            far = sum(node[a] != node[b] for a, b in pairs)
            assert loads.nic_out_WLG[w, layer].sum() == far
            assert loads.nvlink_in_WLG[w, layer].sum() == len(pairs) - far
            far_GG = np.zeros((4, 4))
            np.add.at(far_GG, tuple(np.array(pairs).T), 1.0)
            fair_X = fair_transfers_WX(far_GG[None], cluster)[0]
            assert loads.fair_transfers_WLX is not None
            assert loads.fair_transfers_WLX[w, layer].tolist() == fair_X.tolist()
            before, home = after, after[:, 0]


@given(st.integers(0, 10_000), st.sampled_from([*MODES, "coherent"]),
       st.sampled_from(["even", "nearest", "balanced", "fewest_active", "sglang_static"]))
@settings(max_examples=60, deadline=None)
def test_what_goes_out_comes_in_and_every_choice_is_computed(
    seed: int, traffic: str, policy: str
) -> None:
    trace, steps, plan = random_case(seed)
    loads = step_loads(trace, steps, plan, place(traffic), DispatchSpec(policy=policy))
    assert np.allclose(loads.nvlink_out_WLG.sum(axis=2), loads.nvlink_in_WLG.sum(axis=2))
    assert np.allclose(loads.nic_out_WLG.sum(axis=2), loads.nic_in_WLG.sum(axis=2))
    assert (loads.tokens_WLG.sum(axis=2) == 3 * loads.tokens_W[:, None]).all()
    assert loads.tokens_W.tolist() == [20, 25, 15]
    node_totals = loads.nic_out_WLG.reshape(3, 2, 2, 2).sum(axis=3)      # two nodes only:
    assert np.allclose(node_totals, loads.nic_in_WLG.reshape(3, 2, 2, 2).sum(axis=3)[..., ::-1])


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_sending_once_never_sends_more(seed: int) -> None:
    trace, steps, plan = random_case(seed)
    spec = DispatchSpec(policy="even")
    expert, rank, node = (
        step_loads(trace, steps, plan, place(t), spec).nic_out_WLG for t in MODES[:3]
    )
    assert (node <= rank).all() and (rank <= expert).all()


def test_uniform_routing_gives_the_closed_form_of_remote_nodes() -> None:
    """Expected other nodes per token = (N - 1)(1 - C(E - E/N, k) / C(E, k))."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((6000, 1, 32)), axis=2)[:, :, :4]
    trace = RoutingTrace.from_arrays(ids, num_experts=32, source=rng.integers(0, 8, 6000))
    plan = Plan(slots=np.arange(32).reshape(1, 8, 4), num_experts=32)
    steps = Steps(np.arange(6000), np.array([0, 3000, 6000]))
    loads = step_loads(trace, steps, plan, place("return_home/per_node", 4, 2, 4),
                       DispatchSpec(policy="even"))
    expected = 3 * (1 - comb(24, 4) / comb(32, 4))
    assert loads.nic_out_WLG.sum() / 6000 == pytest.approx(expected, rel=0.02)


def test_layers_in_an_executor_come_back_in_order() -> None:
    trace, steps, plan = random_case(1, layers=4)
    cluster = place("return_home/per_rank")

    class Pool:
        def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(function, items))

    alone = step_loads(trace, steps, plan, cluster)
    pooled = step_loads(trace, steps, plan, cluster, executor=Pool())
    for name in ("tokens_WLG", "nic_in_WLG", "nvlink_out_WLG", "active_WLG"):
        assert np.array_equal(getattr(alone, name), getattr(pooled, name))
    some = step_loads(trace, steps, plan, cluster, layers=[3, 1])
    assert np.array_equal(some.tokens_WLG, alone.tokens_WLG[:, [3, 1]])


def test_weights_read_and_table_time_are_summed_over_slots_with_tokens() -> None:
    trace, steps, plan = random_case(2)
    table = ComputeProfile(hbm_bytes_per_s=1, flops_per_s=1, expert_table_tokens=(1, 5),
                           expert_table_us=(10, 18))
    cluster = place("return_home/per_expert")
    hardware = cluster.hardware.model_copy(update={"compute": table})
    cluster = cluster.model_copy(update={"hardware": hardware})
    sizes = np.arange(1, 9) * 100
    loads = step_loads(trace, steps, plan, cluster, DispatchSpec(policy="even"),
                       expert_bytes_E=sizes)
    assert loads.weight_bytes_WLG is not None and loads.expert_us_WLG is not None
    taken = steps.tokens_of(0)
    slot_TK = route(trace.ids[taken, 0].astype(int), trace.home_rank_T(4)[taken], plan.slots[0],
                    cluster, DispatchSpec(policy="even"), 8)
    tokens_S = np.bincount(slot_TK.reshape(-1), minlength=12)
    expert_S = plan.slots[0].reshape(-1)
    for g in range(4):
        used = [s for s in range(3 * g, 3 * g + 3) if tokens_S[s]]
        assert loads.weight_bytes_WLG[0, 0, g] == sum(sizes[expert_S[s]] for s in used)
        assert loads.expert_us_WLG[0, 0, g] == pytest.approx(
            sum(10 + 2 * (tokens_S[s] - 1) for s in used)      # linear, also past the end
        )
    assert loads.expert_us_extrapolated and tokens_S.max() > 5


def test_what_does_not_belong_together_is_refused() -> None:
    trace, steps, plan = random_case(0)
    with pytest.raises(InputError, match="2 layers of 9 experts, the trace 2 of 8"):
        slots = np.concatenate([plan.slots, np.full((2, 4, 1), 8)], axis=2)
        step_loads(trace, steps, Plan(slots=slots, num_experts=9), place("allgather"))
    with pytest.raises(InputError, match="for 4 devices, the cluster has 6"):
        step_loads(trace, steps, plan, place("allgather", 3))
    with pytest.raises(InputError, match="count all of them"):
        step_loads(trace, steps, plan, place("coherent"), layers=[1])
