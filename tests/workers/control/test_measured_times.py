"""What a switch costs: guessed before the first one, learned from every one after it.

And how steady the machine is from one window to the next.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.hardware import ComputeProfile
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.workers.calibrate.expert_fit import ExpertFit
from loadmaster.workers.control import measured_times
from loadmaster.workers.control.measured_times import LiveTimes, MovePrice, stalls
from loadmaster.workers.coordinator.step_log import Measurements
from loadmaster.workers.protocol.plan_switch import ApplyReport


def test_before_any_switch_small_experts_are_not_thought_free() -> None:
    """Messages, hashes and rounds take their time however few the bytes."""
    assert MovePrice().us(20, 20 * 36_000.0) > 20_000
    assert MovePrice().us(0, 0.0) == 0.0


def test_large_experts_cost_by_their_bytes() -> None:
    assert MovePrice().us(1, 1e9) == pytest.approx(1e6, rel=0.01)


def test_a_switch_felt_is_what_the_like_of_it_will_cost() -> None:
    price = MovePrice().learned(20, 7e5, felt_us=90_000.0)
    assert price.us(20, 7e5) == pytest.approx(90_000.0)
    assert price.us(10, 3.5e5) == pytest.approx(45_000.0)
    again = price.learned(4, 1.4e5, felt_us=4_000.0)
    assert again.us(4, 1.4e5) == pytest.approx(4_000.0), "the last one counts, not a product"


def test_a_switch_nobody_felt_teaches_nothing() -> None:
    price = MovePrice(2.0)
    assert price.learned(20, 7e5, felt_us=0.0) == price
    assert price.learned(0, 0.0, felt_us=500.0) == price


# ---- stalls ------------------------------------------------------------------------------------

REPORT = ApplyReport(
    epoch=2, moved=(), moved_bytes=0, retried_bytes=0, stage_steps=3, stage_us=9000.0,
    verify_us=40.0, commit_us=700.0,
)


def measured(stage_us_WG: list[list[float]], staging_W: list[bool]) -> Measurements:
    """Steps of one layer and two ranks, of which only what moving experts took matters."""
    steps, figure = len(staging_W), np.zeros((len(staging_W), 1, 2))
    none_WG, each_W = np.zeros((steps, 2)), np.arange(steps)
    return Measurements(
        step=each_W, epoch=each_W, rows=none_WG.astype(int), expert_cpu_us=figure,
        tokens=figure.astype(int), remote_transfers=figure.astype(int), dropped=figure.astype(int),
        peak=np.zeros((steps, 1), int), step_wall_us=np.zeros(steps), step_cpu_us=none_WG,
        stage_us=np.array(stage_us_WG, float).reshape(steps, 2),
        staging=np.array(staging_W, bool),
    )


def test_steps_that_carried_a_switch_say_what_it_took() -> None:
    felt = stalls(measured([[5, 9], [300, 100], [20, 50]], [False, True, True]), REPORT)
    assert felt["stage_us"] == felt["staging_us"] == 350.0
    assert felt["commit_us"] == 40.0 and felt["commit_step_us"] == 700.0


def test_steps_served_before_it_began_say_nothing_of_it() -> None:
    """Nothing was served while it staged: then the wall time of staging is the price."""
    felt = stalls(measured([[5, 9], [7, 3]], [False, False]), REPORT)
    assert felt["stage_us"] == 0.0
    assert felt["staging_us"] == REPORT.stage_us


# ---- steadiness --------------------------------------------------------------------------------


def test_phases_differ_in_speed_without_being_unsteady(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = iter([1.0, 1.6, 1.0, 1.6, 1.1])
    fit = ExpertFit(
        ComputeProfile(start_us=1.0, hbm_bytes_per_s=1e9, flops_per_s=1e9), 0.0, live_error=0.02
    )

    def scaled(*given: Any) -> ExpertFit:
        return dataclasses.replace(fit, live_factor=next(factors))

    monkeypatch.setattr(measured_times, "scale_to_live", scaled)
    model = ModelSpec(
        num_layers=1, num_experts=4, top_k=1, hidden=8, intermediate=8, bytes_per_parameter=2.0
    )
    cluster = Cluster.preset("cpu", devices_per_node=2, slots_per_device=2)
    times, nothing = LiveTimes(model, cluster, fit), Any
    for phase in (0, 1, 0, 1):
        error = times.measure(nothing_of(), nothing, phase)  # type: ignore[arg-type]
        assert error == pytest.approx(0.02)
    changed = times.measure(nothing_of(), nothing, 0)  # type: ignore[arg-type]
    assert changed == pytest.approx(0.02 + np.log(1.1) / np.sqrt(2))


def nothing_of() -> Any:
    """A window nobody looks into."""

    class Empty:
        measured = trace = None

    return Empty()
