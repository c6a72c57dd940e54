"""Fair flows: the slow oracle of the port bound and the fair rates that `step_cost` uses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.oracles.flows import Flows, Network, fair_finish_s, fair_rates, port_bound_s
from loadmaster.errors import InputError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.max_min_rates import fair_transfers_WX
from loadmaster.placement.cost.step_cost import step_cost
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.plan import DispatchSpec
from loadmaster.simulator.report.traffic_matrix import mean_transfers_GG, transfers_GG
from loadmaster.traces.steps import StepSampler

from ..conftest import contiguous_plan


def network(nodes=1, per_node=4, oversubscription=None) -> Network:
    """NVLink 8, NIC 2 bytes per second; a spine of the node's NICs over the oversubscription."""
    cluster = Cluster.preset("h100", nodes=nodes, devices_per_node=per_node, slots_per_device=1)
    spine = None if oversubscription is None else 2.0 * per_node / oversubscription
    profile = cluster.hardware.dispatch.model_copy(
        update={"nvlink_bytes_per_s": 8.0, "nic_bytes_per_s": 2.0, "spine_bytes_per_s": spine}
    )
    return Network.of(cluster, profile)


def makespan(matrix, net) -> float:
    return float(fair_finish_s(Flows.of_matrix(np.asarray(matrix, float), net), net).max())


def test_two_flows_into_one_port_share_it() -> None:
    """Rates 4 and 4 into device 2 until the smaller ends; then 8."""
    net = network(per_node=3)
    matrix = np.zeros((3, 3))
    matrix[0, 2], matrix[1, 2] = 8.0, 16.0
    np.testing.assert_allclose(fair_finish_s(Flows.of_matrix(matrix, net), net), [2.0, 3.0])


def test_a_flow_held_back_elsewhere_leaves_its_share_to_others() -> None:
    """Three flows leave port 0 at 8/3; the one into busy port 3 gets no more than port 3 gives."""
    links = np.array([[0, 4], [0, 5], [1, 4], [2, 4]])
    rates = fair_rates(links, np.array([8.0, 8, 8, 8, 6, 8]))
    np.testing.assert_allclose(rates, [2.0, 6.0, 2.0, 2.0])


def test_uniform_traffic_takes_exactly_the_port_bound() -> None:
    """The closed form: every port is equally full, so nothing waits for anything else."""
    for nodes, per_node in ((1, 4), (2, 4), (4, 2)):
        net = network(nodes, per_node)
        devices = nodes * per_node
        flows = Flows.of_matrix(np.full((devices, devices), 3.0), net)
        bound = port_bound_s(flows, net)
        far = devices - per_node
        assert bound == pytest.approx(max((per_node - 1) * 3 / 8, far * 3 / 2))
        assert fair_finish_s(flows, net).max() == pytest.approx(bound)


@given(st.integers(0, 10_000), st.sampled_from([None, 2.0, 4.0]), st.floats(0.05, 2.0))
@settings(max_examples=40, deadline=None)
def test_fair_flows_never_beat_the_busiest_port(seed, oversubscription, skew) -> None:
    net = network(2, 4, oversubscription)
    matrix = np.random.default_rng(seed).gamma(skew, size=(8, 8))
    flows = Flows.of_matrix(matrix, net)
    assert fair_finish_s(flows, net).max() >= port_bound_s(flows, net) * (1 - 1e-9)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_faster_links_never_delay_the_last_flow_of_uniform_ports(seed) -> None:
    """Scaling every link by two halves every end."""
    matrix = np.random.default_rng(seed).gamma(0.5, size=(8, 8))
    slow = network(2, 4)
    fast = Network(slow.bytes_per_s_X * 2, slow.node_G, slow.has_spine)
    ends_slow = fair_finish_s(Flows.of_matrix(matrix, slow), slow)
    ends_fast = fair_finish_s(Flows.of_matrix(matrix, fast), fast)
    np.testing.assert_allclose(ends_fast * 2, ends_slow)


def test_where_the_port_bound_is_far_too_low() -> None:
    """Four senders, a hot receiver, twelve others: 25 seconds where the bound says 16.

    While the senders share their rate among 13 receivers the hot one idles; at the end it alone
    is left. (One unit per second on every port.)
    """
    senders, units = 4, 4
    others = units * (senders - 1)
    devices = senders + 1 + others
    net = network(per_node=devices)
    unit = Network(np.ones_like(net.bytes_per_s_X), net.node_G, False)
    matrix = np.zeros((devices, devices))
    matrix[:senders, senders] = units
    matrix[:senders, senders + 1 :] = 1.0
    flows = Flows.of_matrix(matrix, unit)
    assert port_bound_s(flows, unit) == pytest.approx(16.0)
    assert fair_finish_s(flows, unit).max() == pytest.approx(25.0)


@given(st.integers(0, 10_000), st.sampled_from([1.0, 1.5, 2.0, 3.0]), st.floats(0.05, 2.0))
@settings(max_examples=40, deadline=None)
def test_the_rates_that_price_an_exchange_are_these(seed, nics, skew) -> None:
    """`fair_sharing.py` behind a shared spine, on whole transfers and on parts, also with pairs
    that send nothing."""
    rng = np.random.default_rng(seed)
    transfers = rng.gamma(skew, size=(8, 8)) * rng.integers(0, 2, (8, 8))
    transfers = np.round(transfers * 5) if seed % 2 else transfers
    net = network(2, 4, 4 / nics)
    cluster = Cluster.preset("h100", nodes=2, devices_per_node=4, slots_per_device=1)
    legs = {
        leg: getattr(cluster.hardware, leg).model_copy(
            update={"nic_bytes_per_s": 2.0, "spine_bytes_per_s": 2.0 * nics}
        ) for leg in ("dispatch", "combine")
    }
    cluster = cluster.model_copy(update={"hardware": cluster.hardware.model_copy(update=legs)})
    far = transfers * (net.node_G[:, None] != net.node_G[None, :])
    slow = makespan(far, net) if far.any() else 0.0
    assert fair_transfers_WX(transfers[None], cluster)[0, 0] / 2.0 == pytest.approx(slow, rel=1e-9)


def test_the_step_cost_is_the_port_bound_of_the_routed_matrix(trace, model) -> None:
    """alpha + busiest port, from the same transfers counted pair by pair: two devices to a node
    wait for nobody here."""
    cluster = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=2)
    plan = contiguous_plan()
    steps = StepSampler(tokens=256, concurrency=16).sample(trace, max_steps=2)
    loads = step_loads(trace, steps, plan, cluster)
    cost = step_cost(loads, model, cluster, dispatch=DispatchSpec())
    profile = cluster.hardware.dispatch
    net = Network.of(cluster, profile)
    copy_bytes = model.hidden * cluster.hardware.dispatch_bytes_per_value
    for w in range(2):
        for layer in range(plan.num_layers):
            transfers = transfers_GG(trace, steps.tokens_of(w), plan, cluster, layer)
            assert transfers.sum() == 256 * trace.top_k
            flows = Flows.of_matrix(transfers * copy_bytes, net)
            alpha_us = profile.alpha_us + profile.alpha_per_log2_node_us
            expected_us = alpha_us + port_bound_s(flows, net) * 1e6
            assert cost.dispatch_us_WL[w, layer] == pytest.approx(expected_us)


def test_the_mean_matrix_counts_every_copy_of_a_step(trace) -> None:
    cluster = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=2)
    steps = StepSampler(tokens=256, concurrency=16).sample(trace)
    matrix = mean_transfers_GG(trace, steps, contiguous_plan(), cluster, max_steps=3)
    assert matrix.sum() == pytest.approx(256 * trace.top_k * trace.num_layers)


def test_traffic_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match="must be"):
        Flows.of_matrix(np.ones((3, 3)), network(per_node=4))
    with pytest.raises(InputError, match="must be"):
        Flows.of_matrix(-np.ones((4, 4)), network(per_node=4))


def test_nothing_to_send_takes_no_time() -> None:
    net = network()
    flows = Flows.of_matrix(np.zeros((4, 4)), net)
    assert port_bound_s(flows, net) == 0.0 and len(fair_finish_s(flows, net)) == 0
