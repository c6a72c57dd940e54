"""Reports: one file that fetches nothing, pictures that say what the arrays hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
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
from loadmaster.simulator.report.page import Table, render_report, write_report
from loadmaster.simulator.report.svg import heat_map, stacked_bars
from loadmaster.simulator.report.views import plan_views
from loadmaster.simulator.serving.batching import BatchLimits
from loadmaster.simulator.serving.simulate import Serving, simulate
from loadmaster.traces.steps import StepSampler

from ..conftest import LAYERS, contiguous_plan, steady_workload


class _Tags(HTMLParser):
    """Counts tags, and notes any that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.bad: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "rect", "polyline", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag) -> None:
        if tag == "rect":
            return
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)


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


@pytest.fixture(scope="module")
def page(served, trace, cluster) -> str:
    views = plan_views(
        {"now": contiguous_plan(), "new <b>": contiguous_plan()}, trace, cluster,
        steps=StepSampler(tokens=256, concurrency=16),
    )
    table = Table("Before and after", ("what", "now"), (("imbalance", "1.5"),))
    return render_report(title="A <run>", verdict="leave it", views=views, results=served,
                         tables=[table], notes=["first note"])


def test_the_page_fetches_nothing(page) -> None:
    assert not re.search(r"https?://|<script|src=|@import|url\(", page)


def test_the_page_is_well_formed_and_escapes_names(page) -> None:
    tags = _Tags()
    tags.feed(page)
    assert not tags.bad and not tags.open
    assert "A &lt;run&gt;" in page and "new &lt;b&gt;" in page and "<b>" not in page


def test_the_page_shows_maps_of_both_plans_and_all_layers(page) -> None:
    assert page.count("load over the layer&#x27;s mean: layer down (3), device across (4)") == 2
    assert page.count("token transfers per step: from rank down (4), to device across (4)") == 2
    assert page.count("layer by layer</summary>") == 2
    assert "leave it" in page and "first note" in page and "Before and after" in page


def test_equal_inputs_give_equal_pages(page, served, trace, cluster) -> None:
    views = plan_views(
        {"now": contiguous_plan(), "new <b>": contiguous_plan()}, trace, cluster,
        steps=StepSampler(tokens=256, concurrency=16),
    )
    table = Table("Before and after", ("what", "now"), (("imbalance", "1.5"),))
    assert page == render_report(title="A <run>", verdict="leave it", views=views,
                                 results=served, tables=[table], notes=["first note"])


def test_views_hold_relative_load_and_every_copy(trace, cluster) -> None:
    view = plan_views({"p": contiguous_plan()}, trace, cluster,
                      steps=StepSampler(tokens=256, concurrency=16))[0]
    np.testing.assert_allclose(view.load_LG.mean(axis=1), 1.0)
    assert view.traffic_GG.sum() == pytest.approx(256 * trace.top_k * LAYERS)


def test_a_heat_map_colours_by_value_and_averages_large_sides() -> None:
    small = heat_map(np.array([[0.0, 1.0, 2.0]]), rows="r", columns="c", middle=1.0,
                     highest=2.0, title="t")
    assert [c in small for c in ("#3168a3", "#f7f7f7", "#be3126")] == [True] * 3
    large = heat_map(np.ones((3, 200)), rows="r", columns="c", middle=1.0, highest=2.0, title="t")
    assert large.count("<rect") == 3 * 50 and "1 x 4 averaged per cell" in large


def test_bars_are_as_long_as_their_parts() -> None:
    bars = stacked_bars({"a": {"x": 30.0, "y": 10.0}, "b": {"x": 10.0, "y": 10.0}}, title="t")
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="17"', bars)]
    assert widths == [360.0, 120.0, 120.0, 120.0]


def test_a_report_is_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "report.html"
    write_report(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_report(path, "\ud800")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


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
