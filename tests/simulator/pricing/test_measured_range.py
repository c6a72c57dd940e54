"""Steps below a measured table are said to be so; a fitted line has no such end."""

from __future__ import annotations

import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.simulator.pricing.measured_range import below_measured
from loadmaster.traces.steps import StepSampler

from ..conftest import contiguous_plan


def with_tables(cluster: Cluster, tokens: float, bytes_: float) -> Cluster:
    """The cluster with tables that begin at so many tokens and bytes."""
    hardware = cluster.hardware
    compute = hardware.compute.model_copy(update={
        "expert_table_tokens": (tokens, 1e6), "expert_table_us": (1.0, 100.0)})
    link = hardware.dispatch.model_copy(update={
        "table_bytes": (bytes_, 1e12), "table_us": (1.0, 100.0)})
    return cluster.model_copy(update={"hardware": hardware.model_copy(
        update={"compute": compute, "dispatch": link, "combine": link})})


@pytest.mark.parametrize(
    ("tokens", "bytes_", "said"),
    [(1.0, 1.0, ()), (1000.0, 1.0, ("tokens per expert",)), (1.0, 1e9, ("bytes per port",)),
     (1000.0, 1e9, ("tokens per expert", "bytes per port"))],
)
def test_each_table_is_told_with_its_first_point(trace, model, cluster, tokens, bytes_, said
                                                 ) -> None:
    steps = StepSampler(tokens=64, concurrency=16).sample(trace, 4)
    loads = step_loads(trace, steps, contiguous_plan(), cluster)
    notes = below_measured(loads, model, with_tables(cluster, tokens, bytes_))
    assert len(notes) == len(said)
    for note, words in zip(notes, said, strict=True):
        assert words in note and "first point" in note


def test_a_fitted_line_has_no_end(trace, model, cluster) -> None:
    steps = StepSampler(tokens=64, concurrency=16).sample(trace, 4)
    loads = step_loads(trace, steps, contiguous_plan(), cluster)
    assert below_measured(loads, model, cluster) == ()
