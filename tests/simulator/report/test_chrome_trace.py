"""The timeline for Perfetto: every step, device and port, never two things at once on a track."""

from __future__ import annotations

import json

import pytest

from loadmaster.simulator.events.plan_switch import PlanSwitch
from loadmaster.simulator.pricing.step_router import StepRouter
from loadmaster.simulator.report.chrome_trace import (
    DEVICES,
    LINKS,
    STEPS,
    chrome_events,
    write_chrome_trace,
)
from loadmaster.simulator.serving.batching import BatchLimits
from loadmaster.simulator.serving.simulate import Serving, simulate

from ..conftest import contiguous_plan, steady_workload


@pytest.fixture(scope="module")
def served(trace, model, cluster):
    plan = contiguous_plan()
    swapped = contiguous_plan()
    return {
        name: simulate(
            p, steady_workload(), cluster, trace=trace, model=model, routing="every_step",
            serving=Serving(BatchLimits(128, 32)), interventions=[PlanSwitch(swapped, 1e3)],
        )
        for name, p in {"now": plan, "new <b>": swapped}.items()
    }


def test_the_chrome_trace_has_every_step_device_and_port(
    tmp_path, served, trace, model, cluster
) -> None:
    router = StepRouter(trace, cluster, model)
    result = served["now"]
    write_chrome_trace(tmp_path / "t.json", result, contiguous_plan(), router)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    steps = [e for e in events if e["pid"] == STEPS and e["ph"] == "X"]
    assert len(steps) == len(result.steps)
    assert {e["tid"] for e in events if e["pid"] == DEVICES and e["ph"] == "X"} == set(range(4))
    assert any(e["pid"] == LINKS and e["ph"] == "X" for e in events)
    assert [e["name"] for e in events if e["ph"] == "i"] == ["switch"]


def test_a_devices_track_never_overlaps_and_fills_its_step(served, trace, model, cluster) -> None:
    result = served["now"]
    events = chrome_events(result, contiguous_plan(), StepRouter(trace, cluster, model))
    for g in range(4):
        mine = sorted((e["ts"], e["dur"]) for e in events
                      if e["pid"] == DEVICES and e["tid"] == g and e["ph"] == "X")
        ends = [ts + dur for ts, dur in mine]
        assert all(b[0] >= end - 0.01 for end, b in zip(ends, mine[1:], strict=False))
    first_us = result.steps.duration_ns[0] / 1e3
    inside = [e for e in events if e["pid"] == DEVICES and e["tid"] == 0 and e["ph"] == "X"
              and e["ts"] < (result.steps.start_ns[0] + result.steps.duration_ns[0]) / 1e3 - 0.01]
    assert sum(e["dur"] for e in inside) <= first_us + 0.1
