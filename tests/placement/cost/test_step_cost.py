"""Microseconds by hand, blame, monotonicity, and what moving experts costs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.overlap import Overlap
from loadmaster.placement.cost.step_cost import (
    HOST,
    SHARED_SPINE,
    StepCost,
    move_cost,
    port_name,
    step_cost,
)
from loadmaster.placement.cost.step_loads import StepLoads, step_loads
from loadmaster.placement.hardware import (
    ComputeProfile,
    ExchangeProfile,
    HardwareProfile,
    interpolate,
)
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace

# Round numbers: an expert is 6e6 weight bytes = 3 us to read; a token is 6e6 flops = 0.01 us;
# a copy is 2,000 bytes out (0.02 us on NVLink, 0.2 us on a NIC), 4,000 bytes back.
MODEL = ModelSpec(name="round", num_layers=1, num_experts=4, top_k=2, hidden=1000,
                  intermediate=1000, other_time_us=7)
EVEN, BALANCED = DispatchSpec(policy="even"), DispatchSpec()


def hardware(**changes: object) -> HardwareProfile:
    link = ExchangeProfile(alpha_us=10, alpha_per_log2_node_us=2, nvlink_bytes_per_s=1e11,
                           nic_bytes_per_s=1e10)
    whole = {
        "name": "round", "compute": ComputeProfile(start_us=5, active_expert_us=1,
                                                   hbm_bytes_per_s=2e12, flops_per_s=6e14),
        "dispatch": link, "combine": link, "counts_collective_us": 4, "memory_bytes": 10**10,
        "dispatch_bytes_per_value": 2, "combine_bytes_per_value": 4,
        "host_to_device_bytes_per_s": 1e10, "source": "made up", "error": "none",
    }
    return HardwareProfile.model_validate(whole | changes)


def cluster(traffic: str = "return_home/per_expert", nodes: int = 2, **changes: object) -> Cluster:
    whole = Cluster.preset("h100", nodes=nodes, devices_per_node=2, slots_per_device=2,
                           traffic=traffic)
    return whole.model_copy(update={"hardware": hardware(**changes)})


def loads(**changes: list[float]) -> StepLoads:
    """One step, one layer, four devices."""
    values = {
        "tokens": [100, 200, 0, 50], "active": [2, 1, 0, 1], "nvlink_out": [10, 0, 0, 0],
        "nvlink_in": [0, 10, 0, 0], "nic_out": [0, 30, 0, 0], "nic_in": [0, 0, 5, 25],
    } | changes
    array = {f"{name}_WLG": np.array([[row]], float) for name, row in values.items()}
    array["tokens_WLG"] = array["tokens_WLG"].astype(int)
    array["active_WLG"] = array["active_WLG"].astype(int)
    return StepLoads(weight_bytes_WLG=None, tokens_W=np.array([175]), **array)


def test_a_layer_by_hand() -> None:
    cost = step_cost(loads(), MODEL, cluster(), dispatch=EVEN)
    # start + active * (1 + 3) + tokens * 0.01; nothing on an idle device
    assert cost.compute_us_WLG[0, 0].tolist() == pytest.approx([5 + 8 + 1, 5 + 4 + 2, 0, 9.5])
    # alpha 10 + 2 * log2(2); the NIC out of device 1 carries 30 transfers
    assert cost.dispatch_us_WL[0, 0] == pytest.approx(12 + 30 * 0.2)
    assert cost.combine_us_WL[0, 0] == pytest.approx(12 + 30 * 0.4)
    assert cost.counts_us_L.tolist() == [0]
    assert cost.layer_us_WL[0, 0] == pytest.approx(14 + 18 + 24)
    assert cost.step_us_W[0] == pytest.approx(56 + 7)
    assert cost.straggler_WL[0, 0] == 0
    assert port_name(int(cost.dispatch_port_WL[0, 0]), 4) == "nic_out of device 1"
    assert port_name(int(cost.combine_port_WL[0, 0]), 4) == "nic_in of device 1"   # mirrored


def test_the_counts_collective_is_charged_where_all_counts_are_needed() -> None:
    even = step_cost(loads(), MODEL, cluster(), dispatch=EVEN)
    for policy in (BALANCED, DispatchSpec(policy="fewest_active")):
        cost = step_cost(loads(), MODEL, cluster(), dispatch=policy)
        assert cost.counts_us_L.tolist() == [4]
        assert np.allclose(cost.layer_us_WL, even.layer_us_WL + 4)


def test_a_layer_without_replicas_gathers_no_counts() -> None:
    """Every rank knows where its tokens go: `balanced` has nothing to decide."""
    single = dataclasses.replace(loads(), gathers_L=(0,))
    even = step_cost(single, MODEL, cluster(), dispatch=EVEN)
    assert step_cost(single, MODEL, cluster(), dispatch=BALANCED).counts_us_L.tolist() == [0]
    always = cluster(counts_always=True)        # live workers agree on their epoch in it
    for policy in (EVEN, BALANCED):
        cost = step_cost(single, MODEL, always, dispatch=policy)
        assert np.allclose(cost.layer_us_WL, even.layer_us_WL + 4)


def test_replicas_are_told_layer_by_layer_and_duplicates_are_none() -> None:
    slots = np.array([[[0, 0], [1, -1]], [[0, 1], [1, -1]], [[0, -1], [1, -1]]])
    trace = RoutingTrace.from_arrays(np.zeros((4, 3, 1), int), num_experts=2)
    place = Cluster.preset("h100", devices_per_node=2, slots_per_device=2)
    steps = StepSampler(tokens=4, order="stored").sample(trace)
    counted = step_loads(trace, steps, Plan(slots, num_experts=2), place)
    assert counted.gathers_L == (0, 1, 0)
    model = MODEL.model_copy(update={"num_layers": 3, "num_experts": 2})
    cost = step_cost(counted, model, place, dispatch=BALANCED)
    assert cost.counts_us_L.tolist() == [0, place.hardware.counts_collective_us, 0]


def test_counts_by_class_that_fill_more_than_one_gather_are_charged_twice() -> None:
    """Two experts on four ranks each: 15 sets of ranks, but one gather holds 4 counts an expert."""
    slots = np.array([[[0, 1]] * 4])
    trace = RoutingTrace.from_arrays(np.zeros((4, 1, 1), int), num_experts=2)
    steps = StepSampler(tokens=4, order="stored").sample(trace)
    model = MODEL.model_copy(update={"num_layers": 1, "num_experts": 2})
    for payload, gathers in (("per_expert", 1), ("per_rank", 2)):
        place = Cluster.preset(
            "h100", devices_per_node=4, slots_per_device=2, traffic=f"return_home/{payload}"
        )
        counted = step_loads(trace, steps, Plan(slots, num_experts=2), place)
        cost = step_cost(counted, model, place, dispatch=BALANCED)
        assert cost.counts_us_L.tolist() == [gathers * place.hardware.counts_collective_us]


def test_one_device_exchanges_nothing() -> None:
    alone = Cluster.preset("h100", devices_per_node=1, slots_per_device=4).model_copy(
        update={"hardware": hardware()}
    )
    one = StepLoads(
        weight_bytes_WLG=None, tokens_W=np.array([9]), tokens_WLG=np.array([[[18]]]),
        active_WLG=np.array([[[4]]]), **{f"{n}_WLG": np.zeros((1, 1, 1)) for n in
                                         ("nvlink_out", "nvlink_in", "nic_out", "nic_in")},
    )
    cost = step_cost(one, MODEL, alone, dispatch=BALANCED)
    assert cost.dispatch_us_WL[0, 0] == cost.combine_us_WL[0, 0] == cost.counts_us_L[0] == 0
    assert port_name(int(cost.dispatch_port_WL[0, 0]), 1) == "none"


def test_coherent_tokens_do_not_come_back() -> None:
    cost = step_cost(loads(), MODEL, cluster("coherent"), dispatch=EVEN)
    assert cost.combine_us_WL[0, 0] == 0 and cost.dispatch_us_WL[0, 0] > 0


def test_the_spine_binds_when_a_node_is_oversubscribed() -> None:
    link = ExchangeProfile(nvlink_bytes_per_s=1e11, nic_bytes_per_s=1e10, spine_bytes_per_s=1e10)
    busy = loads(nic_out=[20, 20, 0, 0], nic_in=[0, 0, 20, 20])
    cost = step_cost(busy, MODEL, cluster(dispatch=link, combine=link), dispatch=EVEN)
    assert cost.dispatch_us_WL[0, 0] == pytest.approx(40 * 0.2)
    assert port_name(int(cost.dispatch_port_WL[0, 0]), 4) == "spine_out of node 0"
    assert port_name(int(cost.combine_port_WL[0, 0]), 4) == "spine_out of node 1"
    assert cost.notes == (SHARED_SPINE,), "how far to believe it is said"
    wide = link.model_copy(update={"spine_bytes_per_s": 2e10})
    cost = step_cost(busy, MODEL, cluster(dispatch=wide, combine=wide), dispatch=EVEN)
    assert cost.notes == (), "what the NICs cannot fill is shared by nobody"


def test_a_narrowed_nic_slows_itself_and_not_the_spine() -> None:
    """A copy takes 0.1 us on a NIC, two thirds of that on the spine: 40, all 60 on the spine, and
    20 on half a NIC take 4 us each."""
    link = ExchangeProfile(nvlink_bytes_per_s=1e11, nic_bytes_per_s=2e10, spine_bytes_per_s=3e10)
    busy = loads(nic_out=[20, 40, 0, 0], nic_in=[0, 0, 30, 30])
    place = cluster(dispatch=link, combine=link)
    whole = step_cost(busy, MODEL, place, dispatch=EVEN).dispatch_us_WL[0, 0]
    half = step_cost(busy, MODEL, place, dispatch=EVEN, nic_share_G=np.array([0.5, 1, 1, 1]))
    quarter = step_cost(busy, MODEL, place, dispatch=EVEN, nic_share_G=np.array([0.25, 1, 1, 1]))
    assert half.dispatch_us_WL[0, 0] == pytest.approx(whole), "40 on a whole NIC take as long"
    assert quarter.dispatch_us_WL[0, 0] == pytest.approx(2 * whole)
    assert port_name(int(quarter.dispatch_port_WL[0, 0]), 4) == "nic_out of device 0"
    assert SHARED_SPINE in half.notes


def test_exact_weight_bytes_replace_the_mean() -> None:
    known = dataclasses.replace(
        loads(), weight_bytes_WLG=np.array([[[2e6, 8e6, 0.0, 4e6]]])
    )
    cost = step_cost(known, MODEL, cluster(), dispatch=EVEN)
    assert cost.compute_us_WLG[0, 0].tolist() == pytest.approx([5 + 2 + 1 + 1, 5 + 1 + 4 + 2, 0,
                                                                5 + 1 + 2 + 0.5])


def test_tables_replace_lines_and_flag_what_nobody_measured() -> None:
    table = ComputeProfile(hbm_bytes_per_s=1, flops_per_s=1, start_us=5,
                           expert_table_tokens=(1, 100), expert_table_us=(10, 20))
    link = ExchangeProfile(nvlink_bytes_per_s=1e11, nic_bytes_per_s=1e10,
                           table_bytes=(0, 1e4), table_us=(8, 16))
    one_node = cluster(nodes=1, compute=table, dispatch=link, combine=link)
    halves = {n: row[:2] for n, row in {
        "tokens": [101, 200], "active": [1, 2], "nvlink_out": [2.5, 0], "nvlink_in": [0, 2.5],
        "nic_out": [0, 0], "nic_in": [0, 0]}.items()}
    cost = step_cost(loads(**halves), MODEL, one_node, dispatch=EVEN)
    slope = 10 / 99
    assert cost.compute_us_WLG[0, 0].tolist() == pytest.approx(
        [5 + 20 + slope, 5 + 2 * (10 + 99 * slope)]
    )
    assert cost.dispatch_us_WL[0, 0] == pytest.approx(8 + 5000 / 1e4 * 8)
    assert any("compute table" in note for note in cost.notes)
    exact = dataclasses.replace(loads(**halves), expert_us_WLG=np.array([[[21.0, 39.0]]]))
    assert step_cost(exact, MODEL, one_node, dispatch=EVEN).compute_us_WLG[0, 0].tolist() == [
        26, 44]


def test_tables_are_linear_between_points_and_go_on_with_the_last_slope() -> None:
    at = [0, 1, 2, 3, 5]
    values, outside = interpolate(at, (1, 3), (10, 30))
    assert values.tolist() == [10, 10, 20, 30, 50] and outside
    assert not interpolate([1, 3], (1, 3), (10, 30))[1]
    assert interpolate([9], (1,), (10,))[0].tolist() == [10]
    assert interpolate([9], (1, 3), (30, 10))[0].tolist() == [10]   # never below what was measured


def test_slow_devices_and_speeds() -> None:
    base = step_cost(loads(), MODEL, cluster(), dispatch=EVEN)
    slow = step_cost(loads(), MODEL, cluster(), dispatch=EVEN, slowdown_G=[1, 3, 1, 1])
    assert slow.compute_us_WLG[0, 0, 1] == pytest.approx(3 * base.compute_us_WLG[0, 0, 1])
    assert slow.straggler_WL[0, 0] == 1
    place = cluster()
    devices = tuple(
        d.model_copy(update={"speed": s}) for d, s in zip(place.devices, (2, 1, 1, 1), strict=True)
    )
    fast = step_cost(loads(), MODEL, place.model_copy(update={"devices": devices}), dispatch=EVEN)
    assert fast.compute_us_WLG[0, 0, 0] == pytest.approx(base.compute_us_WLG[0, 0, 0] / 2)
    for bad in ([1, 1], [1, 1, 1, -1], [1, 1, 1, float("nan")]):
        with pytest.raises(UsageError, match="slowdown"):
            step_cost(loads(), MODEL, cluster(), dispatch=EVEN, slowdown_G=bad)


def test_time_needs_sizes() -> None:
    bare = ModelSpec(num_layers=1, num_experts=4, top_k=2)
    with pytest.raises(UsageError, match="hidden and intermediate sizes"):
        step_cost(loads(), bare, cluster(), dispatch=EVEN)


def test_overlap_hides_part_of_the_exchange_but_no_compute() -> None:
    plain = step_cost(loads(), MODEL, cluster(), dispatch=EVEN)
    same = step_cost(loads(), MODEL, cluster(), dispatch=EVEN, overlap=Overlap("none"))
    assert np.allclose(plain.layer_us_WL, same.layer_us_WL)
    halves = step_cost(loads(), MODEL, cluster(), dispatch=EVEN, overlap=Overlap("two_batch"))
    assert plain.compute_us_WLG.max() <= halves.layer_us_WL[0, 0] <= plain.layer_us_WL[0, 0]


rows = st.lists(st.integers(0, 400), min_size=4, max_size=4)


@given(rows, rows, rows, rows, rows, st.integers(0, 3), st.sampled_from(
    ["tokens", "active", "nvlink_out", "nvlink_in", "nic_out", "nic_in"]))
@settings(max_examples=80, deadline=None)
def test_more_of_anything_is_never_faster(
    tokens: list[int], a: list[int], b: list[int], c: list[int], d: list[int], where: int,
    what: str,
) -> None:
    given_rows = {"tokens": tokens, "active": [min(t, 2) for t in tokens], "nvlink_out": a,
                  "nvlink_in": b, "nic_out": c, "nic_in": d}
    before = _time(loads(**given_rows))
    more = {n: list(row) for n, row in given_rows.items()}
    more[what][where] += 10
    assert _time(loads(**more)) >= before
    faster = cluster(dispatch=ExchangeProfile(alpha_us=10, alpha_per_log2_node_us=2,
                                              nvlink_bytes_per_s=2e11, nic_bytes_per_s=2e10))
    assert _time(loads(**given_rows), faster) <= before


def _time(given: StepLoads, where: Cluster | None = None) -> float:
    cost: StepCost = step_cost(given, MODEL, where or cluster(), dispatch=EVEN)
    return float(cost.step_us_W[0])


# ---- moving experts -------------------------------------------------------------------------

PLAN = Plan(slots=np.array([[[0, 1], [2, 3], [0, 2], [1, 3]]]), num_experts=4)
SIZE = 6_000_000


def test_weights_come_from_the_own_node_where_it_holds_them() -> None:
    cost = move_cost([(0, 1, 0), (0, 3, 2), (0, 0, 3)], PLAN, MODEL, cluster())
    assert cost.source == (0, 2, 1)
    assert cost.bytes == 3 * SIZE and cost.moves == 3
    assert cost.nic_in_bytes_G.sum() == 0
    assert cost.us == pytest.approx(SIZE / 1e11 * 1e6)      # three links side by side
    assert cost.seconds == pytest.approx(cost.us / 1e6)


def test_senders_take_turns_and_ports_queue() -> None:
    """Expert 0 is on 0 and 2. Devices 1 and 3 ask their own node; nobody sends twice."""
    plan = Plan(slots=np.array([[[0, 1], [0, 2], [3, -1], [3, -1]]]), num_experts=4)
    cost = move_cost([(0, 2, 0), (0, 3, 0), (0, 2, 1), (0, 3, 2)], plan, MODEL, cluster())
    assert cost.source == (0, 1, 0, 1)
    assert cost.nic_out_bytes_G.tolist() == [2 * SIZE, 2 * SIZE, 0, 0]
    assert cost.us == pytest.approx(2 * SIZE / 1e10 * 1e6)


def test_what_only_lost_devices_held_comes_from_host_memory() -> None:
    plan = Plan(slots=np.array([[[0, 1], [2, 3], [0, -1], [1, -1]]]), num_experts=4)
    cost = move_cost([(0, 2, 2), (0, 3, 0)], plan, MODEL, cluster(), unavailable=[1])
    assert cost.source == (HOST, 2)
    assert cost.host_bytes_G.tolist() == [0, 0, SIZE, 0]
    assert cost.us == pytest.approx(SIZE / 1e10 * 1e6)


def test_no_moves_cost_nothing_and_moves_outside_the_plan_are_refused() -> None:
    nothing = move_cost([], PLAN, MODEL, cluster())
    assert (nothing.bytes, nothing.us, nothing.source) == (0, 0, ())
    with pytest.raises(InputError, match="device 9"):
        move_cost([(0, 9, 0)], PLAN, MODEL, cluster())
