"""Every question's report says what its answer says: verdict, figures, pictures, document."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.comparison.compare import compare
from loadmaster.placement.rebalancing.advise import CURRENT, advise
from loadmaster.placement.rebalancing.advise_loads import advise_loads
from loadmaster.simulator.cache.compare import compare_caches
from loadmaster.simulator.cache.expert_cache import CacheTier
from loadmaster.simulator.events.plan_switch import PlanSwitch
from loadmaster.simulator.report.cache_report import cache_report
from loadmaster.simulator.report.compared_parts import load_picture
from loadmaster.simulator.report.evaluate_report import evaluate_report, shown_names
from loadmaster.simulator.report.page import render_page
from loadmaster.simulator.report.plan_report import (
    arriving_LG,
    even_load_LG,
    loads_report,
    plan_report,
    shown_plans,
)
from loadmaster.simulator.report.replay_report import replay_report
from loadmaster.simulator.report.report import Report, Table
from loadmaster.simulator.report.simulate_report import simulate_report
from loadmaster.simulator.report.trace_report import trace_report
from loadmaster.simulator.report.views import plan_views
from loadmaster.simulator.report.whatif_report import whatif_report
from loadmaster.simulator.serving.batching import BatchLimits
from loadmaster.simulator.serving.compare_served import serve_each
from loadmaster.simulator.serving.replay import replay
from loadmaster.simulator.serving.simulate import Serving
from loadmaster.simulator.whatif.resume import Cell
from loadmaster.simulator.whatif.run import WhatIf
from loadmaster.traces.analysis.summary import trace_info
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler

from ..conftest import EXPERTS, LAYERS, contiguous_plan, steady_workload

STEPS = StepSampler(tokens=256, concurrency=16)
WIDE = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=3)


def cells(table: Table, column: str) -> list[str]:
    """One column of a table."""
    index = table.header.index(column)
    return [row[index] for row in table.rows]


def names(report: Report) -> list[str]:
    """Its pictures, in order."""
    return [p.name for p in report.draw()]


@pytest.fixture(scope="module")
def advice(trace):
    return advise(trace, WIDE, methods=("greedy", "eplb"), steps=STEPS, effort="fast",
                  current=contiguous_plan())


def test_views_hold_relative_load_and_every_transfer(trace, cluster) -> None:
    view = plan_views({"p": contiguous_plan()}, trace, cluster, steps=STEPS)[0]
    np.testing.assert_allclose(view.load_LG.mean(axis=1), 1.0)
    assert view.traffic_GG.sum() == pytest.approx(256 * trace.top_k * LAYERS)


def test_plan_says_what_to_do_and_what_it_takes(trace, advice) -> None:
    views = plan_views(shown_plans(advice), trace, WIDE, steps=STEPS)
    report = plan_report(advice, lambda: views, WIDE, ("from the file",))
    assert report.verdict == advice.verdict and report.notes[-1] == "from the file"
    compared, planned, moving = report.tables[:3]
    assert cells(compared, "plan") == list(advice.comparison.ranking)
    assert cells(compared, "imbalance") == [f"{r.metric:.3f}" for r in advice.comparison.rows]
    assert cells(planned, "gap")[0].endswith(" %")
    assert cells(moving, "experts to send") == [f"{m.moves:,}" for m in advice.moving.values()]
    assert names(report)[:3] == ["load", "steps", "replicas"]
    assert ("moves" in names(report)) == (advice.chosen != CURRENT)
    assert report.document["verdict"] == advice.verdict and "gap" in report.document["rows"][0]
    assert f"judged on {advice.judged_on}" in report.judged_on


def test_before_and_after_are_the_reference_and_the_choice(advice) -> None:
    assert next(iter(shown_plans(advice))) == CURRENT and len(shown_plans(advice)) == 2


def test_arrivals_are_the_moves_counted_by_layer_and_device() -> None:
    before, after = contiguous_plan(), contiguous_plan()
    slots = after.slots.copy()
    slots[1, 0, 0], slots[1, 2, 1] = slots[1, 2, 1], slots[1, 0, 0]      # two experts swap
    arrive_LG = arriving_LG(before, type(after)(slots, EXPERTS))
    assert arrive_LG.sum() == 2 and arrive_LG[1, 0] == arrive_LG[1, 2] == 1


def test_average_loads_are_shown_as_replicas_share_them(trace) -> None:
    load_LE = trace.load_LE().astype(np.float64)
    found = advise_loads(Profile.from_loads(load_LE), WIDE, methods=("greedy", "contiguous"))
    report = loads_report(found, load_LE, WIDE)
    by_hand = np.zeros(4)
    plan = found.plan
    for g in range(4):
        for e in plan.slots[0, g]:
            if e >= 0:
                by_hand[g] += load_LE[0, e] / (plan.slots[0] == e).sum()
    np.testing.assert_allclose(
        even_load_LG(plan, load_LE, WIDE)[0], by_hand / by_hand.mean(), rtol=1e-9
    )
    assert report.verdict == found.verdict and names(report) == ["load"]
    assert cells(report.tables[0], "plan") == list(found.results)


def test_evaluate_sets_the_reference_beside_the_best_other(trace, cluster) -> None:
    plans = {"now": contiguous_plan(), "even": contiguous_plan(dispatch="even")}
    table = compare(plans, trace, cluster, steps=STEPS)
    assert shown_names(table) == ("now", "even")
    views = plan_views(plans, trace, cluster, steps=STEPS)
    report = evaluate_report(table, lambda: views, cluster)
    assert report.verdict == table.verdict and names(report) == ["steps", "load", "traffic"]
    own = table.evaluations["now"]
    index = cells(report.tables[0], "plan").index("now")
    assert cells(report.tables[0], "p99")[index] == f"{own.imbalance_p99:.3f}"


def test_plans_share_the_colours_of_their_maps(trace, cluster) -> None:
    views = plan_views({"a": contiguous_plan(), "b": contiguous_plan(dispatch="even")}, trace,
                       cluster, steps=STEPS)
    domains = {
        tuple(chart.to_dict()["encoding"]["color"]["scale"]["domain"])
        for chart in load_picture(views).charts
    }
    assert len(domains) == 1


@pytest.fixture(scope="module")
def served(trace, model, cluster):
    plans = {"now": contiguous_plan(), "new <b>": contiguous_plan(dispatch="even")}
    return serve_each(
        plans, steady_workload(), cluster, trace=trace, model=model,
        serving=Serving(BatchLimits(128, 32)), interventions=[PlanSwitch(contiguous_plan(), 1e3)],
    )


def test_simulate_shows_waits_time_events_and_layers(served, trace, cluster) -> None:
    views = plan_views({"now": contiguous_plan()}, trace, cluster, steps=STEPS)
    report = simulate_report(served, lambda: views, cluster)
    assert report.verdict == served.verdict
    assert names(report) == ["latency", "time", "events", "layers", "load", "traffic"]
    users = report.tables[0]
    assert cells(users, "plan") == [row.name for row in served.paired.rows]
    assert cells(users, "behind the best")[0] == "best"
    folded = [t.title for t in report.tables if t.folded]
    assert sorted(folded) == ["new <b>, layer by layer", "now, layer by layer"]
    assert "switch" in cells(next(t for t in report.tables if t.title == "What happened"), "what")
    page = render_page(report)
    assert "new &lt;b&gt;" in page and "<b>" not in page.replace("new <b>", "")


def test_replay_shows_every_step(trace, model, cluster) -> None:
    plans = {"now": contiguous_plan(), "even": contiguous_plan(dispatch="even")}
    played = replay(plans, trace, cluster, model=model, steps=STEPS)
    report = replay_report(played)
    assert report.verdict == played.comparison.verdict
    assert names(report) == ["steps", "time", "clock", "layers"]
    assert cells(report.tables[0], "plan") == list(played.comparison.ranking)


def test_whatif_ranks_and_draws_the_front() -> None:
    figures = {"latency_mean_us": 9e4, "devices": 8.0, "expert_bytes_per_device": 2e9}
    table = WhatIf((
        Cell({"nodes": 1}, figures, None, ()),
        Cell({"nodes": 2}, figures | {"latency_mean_us": 5e4, "devices": 16.0}, None, ("a note",)),
        Cell({"nodes": 9}, {}, "too many", ()),
    ))
    report = whatif_report(table, ("nodes",), "latency_mean_us")
    assert report.verdict == "best by latency mean us: nodes 2, 50.0 ms"
    assert cells(report.tables[0], "nodes") == ["2", "1"]
    assert cells(report.tables[0], "expert bytes per device") == ["2.00 GB", "2.00 GB"]
    assert report.tables[1].rows == (("nodes 9", "too many"),) and names(report) == ["front"]
    nothing = whatif_report(WhatIf((Cell({"nodes": 9}, {}, "too many", ()),)), ("nodes",),
                            "latency_mean_us")
    assert nothing.verdict == "no scenario could be served" and nothing.draw() == ()


def test_cache_sets_policies_side_by_side(trace, model) -> None:
    one = Cluster.preset("h100", devices_per_node=1, slots_per_device=EXPERTS)
    tier = CacheTier.of(4, model, one, tier="host", shared=False)
    table = compare_caches(trace, tier, model, one, policies=("lru", "belady"),
                           predictors=("none",), max_steps=20)
    report = cache_report(table)
    assert cells(report.tables[0], "policy") == [row.name for row in table.rows]
    assert cells(report.tables[0], "hits")[0] == f"{100 * table.rows[0].figures.hit_rate:.1f} %"


def test_trace_shows_its_curve_or_says_why_not(trace) -> None:
    facts = trace_info(trace)
    report = trace_report(facts)
    assert names(report) == ["learning", "skew"] and report.verdict == facts.verdict
    loads = trace_info(Profile.from_loads(np.ones((2, 4))))
    assert names(trace_report(loads)) == ["skew"]
    assert math.isclose(float(dict(trace_report(loads).tables[0].rows)["layers"]), 2)
