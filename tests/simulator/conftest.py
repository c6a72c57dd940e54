"""Small inputs that the simulator's tests share."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.simulator.serving.workload import Workload
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def skewed_trace(tokens: int = 4_000, seed: int = 0) -> RoutingTrace:
    """Expert e is chosen about 1 / (e + 1) as often as expert 0; two domains mirror each other."""
    rng = np.random.default_rng(seed)
    domain = (np.arange(tokens) // 50) % 2
    score = rng.gumbel(size=(tokens, LAYERS, EXPERTS)) - np.log(np.arange(EXPERTS) + 1.0)
    score = np.where(domain[:, None, None] == 1, score[:, :, ::-1], score)
    ids = np.argsort(-score, axis=2, kind="stable")[:, :, :TOP_K]
    return RoutingTrace.from_arrays(
        ids, num_experts=EXPERTS, request=np.arange(tokens) // 50, domain=domain,
        domain_names=("front", "back"),
    )


def contiguous_plan(devices: int = 4, slots: int = 2, dispatch: str = "balanced") -> Plan:
    """Experts in order; slots beyond the experts hold experts 0, 1, ... again."""
    flat = np.arange(devices * slots) % EXPERTS
    return Plan(
        np.tile(flat.reshape(1, devices, slots), (LAYERS, 1, 1)).astype(np.int16), EXPERTS,
        dispatch=DispatchSpec(policy=dispatch),
    )


@pytest.fixture(scope="session")
def trace() -> RoutingTrace:
    return skewed_trace()


@pytest.fixture(scope="session")
def model() -> ModelSpec:
    return ModelSpec(
        name="small", num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, hidden=1024,
        intermediate=512,
    )


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=2)


@pytest.fixture
def plan() -> Plan:
    return contiguous_plan()


def steady_workload(requests: int = 40, gap_us: float = 400.0, seed: int = 0) -> Workload:
    """Requests of mixed lengths at random times."""
    rng = np.random.default_rng(seed)
    return Workload.from_arrays(
        np.cumsum(rng.exponential(gap_us, requests)), rng.integers(1, 60, requests),
        rng.integers(1, 30, requests),
    )


@pytest.fixture
def workload() -> Workload:
    return steady_workload()
