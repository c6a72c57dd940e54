"""What the demo says above its decode table: a gain within the noise is none."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.comparison.compare import Comparison, compare
from loadmaster.placement.plan import Plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace
from loadmaster.workers.demo.measure import Gain
from loadmaster.workers.demo.run import decode_verdict


def plan(*devices: list[int]) -> Plan:
    return Plan(slots=np.array([devices]), num_experts=8)


@pytest.fixture(scope="module")
def table() -> Comparison:
    """Two hot experts on one device, or apart: apart is faster, by a few per cent of a step."""
    rng = np.random.default_rng(0)
    hot = rng.random((6000, 2)) < 0.5
    ids = np.where(hot, [0, 1], 2 + np.arange(2) + 2 * rng.integers(0, 3, (6000, 2)))
    trace = RoutingTrace.from_arrays(ids[:, None, :], num_experts=8, request=np.arange(6000) // 40)
    model = ModelSpec(num_layers=1, num_experts=8, top_k=2, hidden=4096, intermediate=4096)
    place = Cluster.preset("h100", devices_per_node=4, slots_per_device=2)
    together = plan([0, 1], [2, 3], [4, 5], [6, 7])
    apart = plan([0, 2], [1, 3], [4, 5], [6, 7])
    found = compare({"contiguous": together, "auto": apart}, trace, place, model=model,
                    steps=StepSampler(tokens=1024, concurrency=8))
    assert found.row("auto").better
    return found


def test_a_predicted_gain_within_the_measured_noise_is_left(table: Comparison) -> None:
    gain = -table.row("auto").change_percent / 100
    said = decode_verdict(table, Gain(share=-0.01, band=1.5 * gain, pairs=30))
    assert said.startswith("leave it at decode: step time by -") and "within the noise" in said
    assert "expert time changed by +1.0% ± " in said


def test_a_gain_beyond_it_is_one(table: Comparison) -> None:
    gain = -table.row("auto").change_percent / 100
    said = decode_verdict(table, Gain(share=gain, band=gain / 2, pairs=30))
    assert said.startswith("auto is better than contiguous: step time ") and "as measured" in said


def test_no_gain_predicted_is_left_whatever_was_measured() -> None:
    same = compare(
        {"contiguous": plan([0, 2], [1, 3], [4, 5], [6, 7]),
         "auto": plan([0, 2], [1, 3], [4, 5], [7, 6])},
        RoutingTrace.from_arrays(np.tile([[[0, 1]]], (2000, 1, 1)), num_experts=8,
                                 request=np.arange(2000) // 40),
        Cluster.preset("h100", devices_per_node=4, slots_per_device=2),
        steps=StepSampler(tokens=128, concurrency=8),
    )
    said = decode_verdict(same, Gain(share=0.2, band=0.01, pairs=30))
    assert said.startswith("leave it at decode: contiguous is fine here")
