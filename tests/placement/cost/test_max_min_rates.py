"""Rates dealt to flows between nodes: cases worked out by hand, and when they are dealt at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.max_min_rates import MERGED, deals_fairly, fair_transfers_WX
from loadmaster.placement.cost.step_cost import SHARED_SPINE, step_cost
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.plan import Plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace


def cluster(
    nodes: int, per_node: int, nics: float | None, combine_nics: float | None = None,
    slots: int = 4,
) -> Cluster:
    """A node's spine carries as much as `nics` of its NICs; None = none."""
    plain = Cluster.preset("h100", nodes=nodes, devices_per_node=per_node, slots_per_device=slots)
    hardware = plain.hardware
    legs = {}
    for leg, carries in (("dispatch", nics), ("combine", combine_nics or nics)):
        profile = getattr(hardware, leg)
        spine = None if carries is None else carries * profile.nic_bytes_per_s
        legs[leg] = profile.model_copy(update={"spine_bytes_per_s": spine})
    return plain.model_copy(update={"hardware": hardware.model_copy(update=legs)})


def flows(devices: int, *pairs: tuple[int, int, float]) -> np.ndarray:
    transfers_GG = np.zeros((devices, devices))
    for source, target, transfers in pairs:
        transfers_GG[source, target] = transfers
    return transfers_GG


def fair(transfers_GG: np.ndarray, where: Cluster) -> list[float]:
    return fair_transfers_WX(transfers_GG[None], where)[0].tolist()


def test_a_busy_device_is_left_alone_on_its_nic_at_the_end() -> None:
    """Two devices share 1.5 NICs: 0.75 each until the one with 1 copy is done, at 4 / 3; the other
    has 3 of its 4 left, at the rate of its NIC. The most loaded port says 4."""
    sent = flows(4, (0, 2, 4), (1, 3, 1))
    assert fair(sent, cluster(2, 2, 1.5)) == pytest.approx([4 / 3 + 3] * 2)
    assert fair(sent, cluster(2, 2, None)) == pytest.approx([4.0] * 2)


def test_a_flow_held_back_elsewhere_leaves_its_share_to_others() -> None:
    """Into device 2 come two flows at 1/2 each; the third flow out of node 0 gets what its spine of
    1.5 has left, 1."""
    sent = flows(6, (0, 2, 2), (1, 4, 4), (5, 2, 2))
    assert fair(sent, cluster(3, 2, 1.5)) == pytest.approx([4.0] * 2)


def test_each_direction_has_its_own_spine() -> None:
    """Two full NICs through a spine of one: twice the time."""
    sent = flows(4, (0, 2, 6), (1, 3, 6))
    assert fair(sent, cluster(2, 2, 1.0, combine_nics=2.0)) == pytest.approx([12.0, 6.0])


def test_copies_inside_a_node_and_none_at_all_take_no_time() -> None:
    assert fair(flows(4, (0, 1, 9), (3, 3, 9)), cluster(2, 2, 1.0)) == [0.0, 0.0]


@given(st.integers(0, 10_000), st.sampled_from([1.0, 2.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_the_mirror_image_takes_equally_long(seed: int, nics: float) -> None:
    """So one dealing serves dispatch and combine."""
    transfers = np.random.default_rng(seed).gamma(0.5, size=(8, 8))
    where = cluster(2, 4, nics)
    assert fair(transfers, where) == pytest.approx(fair(transfers.T, where))


@given(st.integers(0, 10_000), st.permutations(range(4)), st.permutations(range(4)))
@settings(max_examples=30, deadline=None)
def test_names_of_devices_do_not_matter(seed: int, first: list[int], second: list[int]) -> None:
    transfers = np.random.default_rng(seed).integers(0, 9, (8, 8)).astype(float)
    named = np.array([*second, *(4 + np.array(first))])
    where = cluster(2, 4, 2.0)
    assert fair(transfers[np.ix_(named, named)], where) == pytest.approx(fair(transfers, where))


@given(st.integers(0, 10_000), st.floats(0.1, 2.0))
@settings(max_examples=40, deadline=None)
def test_more_copies_everywhere_take_longer_in_proportion(seed: int, skew: float) -> None:
    transfers = np.random.default_rng(seed).gamma(skew, size=(8, 8))
    where = cluster(2, 4, 2.0)
    assert fair(3 * transfers, where) == pytest.approx([3 * t for t in fair(transfers, where)])


@given(st.integers(0, 10_000), st.floats(0.1, 2.0))
@settings(max_examples=40, deadline=None)
def test_without_a_spine_ends_are_merged_at_little_loss(seed: int, skew: float) -> None:
    """A spine that never binds makes the dealing exact: same links, merged and not."""
    transfers = np.random.default_rng(seed).gamma(skew, size=(16, 16))
    merged = fair(transfers, cluster(2, 8, None))[0]
    exact = fair(transfers, cluster(2, 8, 8.0, combine_nics=7.999999))[0]
    far = transfers * np.kron([[0, 1], [1, 0]], np.ones((8, 8)))
    bound = max(far.sum(axis=0).max(), far.sum(axis=1).max())
    assert exact * (1 - 2 * MERGED) <= max(merged, bound) <= exact * (1 + MERGED)


def test_rates_are_dealt_where_it_matters_or_costs_little() -> None:
    assert deals_fairly(cluster(8, 8, 4.0))
    assert not deals_fairly(cluster(16, 8, 4.0))
    assert not deals_fairly(cluster(8, 8, 8.0)), "nobody shares it"
    assert deals_fairly(cluster(2, 8, None))
    assert not deals_fairly(cluster(4, 8, None))
    assert not deals_fairly(cluster(1, 8, None))


def test_a_step_costs_what_fair_sharing_takes_or_says_that_it_may_take_longer() -> None:
    model = ModelSpec(name="small", num_layers=1, num_experts=16, top_k=2, hidden=1024,
                      intermediate=512)
    trace = synth_trace(layers=1, experts=16, top_k=2, tokens=512, zipf=1.0, seed=0)

    def cost_of(where: Cluster, timed: bool = True):
        slots = np.arange(where.num_devices).reshape(1, -1, 1) % 16
        plan = Plan(slots.astype(np.int16), 16)
        steps = StepSampler(tokens=512, order="stored").sample(trace)
        loads = step_loads(trace, steps, plan, where, timed=timed)
        return loads, step_cost(loads, model, where, dispatch=plan.dispatch)

    where = cluster(4, 4, 2.0)
    loads, cost = cost_of(where)
    profile, hardware = where.hardware.dispatch, where.hardware
    copy_us = 1024 * hardware.dispatch_bytes_per_value / profile.nic_bytes_per_s * 1e6
    alpha_us = profile.alpha_us + 2 * profile.alpha_per_log2_node_us
    assert loads.fair_transfers_WLX is not None
    exchanged_us = alpha_us + loads.fair_transfers_WLX[0, 0, 0] * copy_us
    assert cost.dispatch_us_WL[0, 0] == pytest.approx(exchanged_us) and cost.notes == ()
    untimed, cheaper = cost_of(where, timed=False)
    assert untimed.fair_transfers_WLX is None
    assert cheaper.dispatch_us_WL[0, 0] < cost.dispatch_us_WL[0, 0]
    assert cheaper.notes == (SHARED_SPINE,)
    assert SHARED_SPINE in cost_of(cluster(20, 4, 2.0))[1].notes
