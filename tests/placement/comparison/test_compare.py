"""Plans side by side: paired, with bands that hold what they say, and a verdict that may be no."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from loadmaster.errors import UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.comparison.compare import compare
from loadmaster.placement.comparison.noise_band import TELLING_MIXES, mean_noise, step_mix
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import Order, StepSampler
from loadmaster.traces.trace import RoutingTrace

PLACE = Cluster.preset("h100", devices_per_node=4, slots_per_device=2)
EVEN = DispatchSpec(policy="even")


def trace(seed: int, requests: int = 60, taste: float = 1.0) -> RoutingTrace:
    """Requests with tastes of their own among 8 experts, 0 and 1 liked by most; unequal lengths."""
    rng = np.random.default_rng(seed)
    liking = np.array([2.0, 2.0, 0, 0, 0, 0, 0, 0]) + taste * rng.standard_normal((requests, 8))
    length = np.minimum(300, 10 + rng.exponential(40, requests)).astype(int)
    request = np.repeat(np.arange(requests), length)
    ids = np.argsort(-(liking[request] + rng.gumbel(size=(len(request), 8))), axis=1)[:, :2]
    return RoutingTrace.from_arrays(ids[:, None, :], num_experts=8, request=request)


def plan(*devices: list[int]) -> Plan:
    return Plan(slots=np.array([devices]), num_experts=8, dispatch=EVEN)


TOGETHER = plan([0, 1], [2, 3], [4, 5], [6, 7])
APART = plan([0, 2], [1, 3], [4, 5], [6, 7])
APART_RENAMED = plan([2, 0], [3, 1], [5, 4], [7, 6])
STEPS = StepSampler(tokens=64, concurrency=8)


def test_a_real_gain_is_called_one() -> None:
    table = compare({"now": TOGETHER, "new": APART}, trace(0), PLACE, steps=STEPS, current="now")
    assert table.ranking == ("new", "now")
    assert table.verdict.startswith("new balances better than now: imbalance ")
    row = table.row("new")
    assert row.change_high_percent < 0 and row.best and not table.row("now").indistinguishable
    assert table.worse_than_reference("now") is False
    back = compare({"new": TOGETHER, "old": APART}, trace(0), PLACE, steps=STEPS, current="old")
    assert back.worse_than_reference("new")
    assert back.verdict.startswith("old is best: imbalance ")


def test_the_same_plan_under_another_name_is_no_gain() -> None:
    table = compare({"now": APART, "same": APART_RENAMED}, trace(0), PLACE, steps=STEPS)
    assert table.ranking == ("now", "same")          # ties to the reference
    assert table.verdict == "now is fine here: same cannot be told apart from it"
    assert table.row("same").change_percent == 0
    assert not table.worse_than_reference("same")


def test_a_gain_below_the_noise_is_left_alone() -> None:
    """Two plans about as good in truth; on this short trace the other one comes out ahead."""
    other = plan([0, 2], [1, 4], [3, 5], [6, 7])
    table = compare({"now": APART, "other": other}, trace(1, 24), PLACE, steps=STEPS,
                    current="now")
    assert table.ranking == ("other", "now")
    assert table.verdict.startswith("now is fine here: the gain of other, ")
    assert "is below the noise of" in table.verdict
    assert table.row("now").indistinguishable and not table.worse_than_reference("other")


def in_flight(seed: int, requests: int, length: int = 40) -> RoutingTrace:
    """Requests of one length, so few that all are in flight in every step."""
    rng = np.random.default_rng(seed)
    liking = np.array([2.0, 2.0, 0, 0, 0, 0, 0, 0]) + rng.standard_normal((requests, 8))
    request = np.repeat(np.arange(requests), length)
    ids = np.argsort(-(liking[request] + rng.gumbel(size=(len(request), 8))), axis=1)[:, :2]
    return RoutingTrace.from_arrays(ids[:, None, :], num_experts=8, request=request)


def test_too_few_requests_tell_nothing() -> None:
    """Four requests, always in flight: nothing says how others would do."""
    table = compare({"now": TOGETHER, "new": APART}, in_flight(0, 4), PLACE, steps=STEPS)
    assert table.independent_steps == pytest.approx(1) and not table.significant
    assert table.verdict.startswith("not enough data: ")
    assert np.isinf(table.row("new").change_high_percent)
    assert not table.worse_than_reference("new") and not table.row("new").better
    document = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert document["rows"][0]["change_high_percent"] is None


@pytest.mark.parametrize("order", ["interleaved", "recorded"])
def test_requests_that_are_all_in_flight_are_redrawn(order: Order) -> None:
    """As at decode: every step holds the same requests, but there are enough to draw others of."""
    same = dataclasses.replace(in_flight(0, 12), step=np.tile(np.arange(40), 12))
    steps = StepSampler(tokens=64, concurrency=64, order=order)
    table = compare({"now": TOGETHER, "new": APART}, same, PLACE, steps=steps, current="now")
    assert table.significant and "redrawing 12 requests" in table.method
    assert table.verdict.startswith("new balances better than now: ")
    again = compare({"now": TOGETHER, "new": APART}, same, PLACE, steps=steps, current="now")
    assert again.to_dict() == table.to_dict()


def test_bands_of_redrawn_requests_cover_the_truth() -> None:
    """Truth: the mean over other draws of eight requests."""
    few = StepSampler(tokens=64, concurrency=64)
    rows = [
        compare({"a": TOGETHER, "b": APART}, in_flight(seed, 8), PLACE, steps=few).row("b")
        for seed in range(30)
    ]
    metric, change = (np.mean([getattr(r, name) for r in rows])
                      for name in ("metric", "change_percent"))
    met = sum(r.metric_low <= metric <= r.metric_high for r in rows)
    met_change = sum(r.change_low_percent <= change <= r.change_high_percent for r in rows)
    assert met >= 26 and met_change >= 26
    half_width = np.median([(r.metric_high - r.metric_low) / 2 for r in rows])
    assert half_width < 2 * 1.96 * np.std([r.metric for r in rows])


TWO_NODES = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=2,
                           traffic="return_home/per_node")


def couples(seed: int) -> RoutingTrace:
    """Experts 0-3 are chosen in pairs by even requests, 4-7 by odd ones; all equally often."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(200), 30)
    first = rng.integers(0, 4, len(request))
    pair = np.stack([first, (first + rng.integers(1, 4, len(request))) % 4], axis=1)
    ids = pair + 4 * (request % 2)[:, None]
    return RoutingTrace.from_arrays(ids[:, None, :], num_experts=8, request=request)


def test_within_slack_fewer_copies_decide_and_the_verdict_says_so() -> None:
    """Both are about as flat; one keeps what is chosen together in one node."""
    apart, local = plan([0, 4], [1, 5], [2, 6], [3, 7]), plan([0, 1], [2, 3], [4, 5], [6, 7])
    place = TWO_NODES
    table = compare({"flat": apart, "local": local}, couples(0), place, steps=STEPS,
                    balance_slack=0.5)
    row = table.row("local")
    assert table.ranking[0] == "local" and row.better and not row.worse
    assert row.transfers is not None and table.row("flat").transfers == pytest.approx(
        table.evaluations["flat"].remote_node_copies_per_token, rel=1e-6)
    assert row.transfers_change_high_percent is not None and row.transfers_change_high_percent < 0
    assert table.verdict.startswith("local is better than flat: node transfers per token ")
    assert " at imbalance " in table.verdict
    back = compare({"local": local, "flat": apart}, couples(0), place, steps=STEPS,
                   balance_slack=0.5)
    assert back.worse_than_reference("flat") and "% more of them" in back.verdict


def test_copies_do_not_decide_beyond_the_slack_nor_where_they_cost_nothing() -> None:
    uneven = plan([0, 1], [2, 3], [4, 5], [6, 7])
    flat = plan([0, 4], [1, 5], [2, 6], [3, 7])
    strict = compare({"a": uneven, "b": flat}, couples(0), TWO_NODES, steps=STEPS,
                     balance_slack=0.0)
    assert strict.ranking == ("b", "a")
    one = compare({"a": uneven, "b": flat}, couples(0), PLACE, steps=STEPS, balance_slack=0.5)
    assert one.ranking == ("b", "a") and one.row("a").transfers is None


def test_balance_decides_where_it_is_the_objective_though_a_model_gives_times() -> None:
    model = ModelSpec(num_layers=1, num_experts=8, top_k=2, hidden=4096, intermediate=1536)
    table = compare({"now": TOGETHER, "new": APART}, trace(0), PLACE, steps=STEPS, model=model,
                    objective="balance")
    assert table.metric_name == "imbalance_mean" and "imbalance" in table.verdict
    assert table.evaluations["new"].step_time_us is not None
    with pytest.raises(UsageError, match="a model of known sizes"):
        compare({"now": APART}, trace(0), PLACE, steps=STEPS, objective="time")


def test_bands_cover_the_truth() -> None:
    """Truth: a long trace. Of 40 short ones a 95 % band may miss a few, and is no barn door."""
    few = StepSampler(tokens=64, concurrency=1)      # so that steps are worth many apart
    truth = compare({"a": TOGETHER, "b": APART}, trace(1, 4000), PLACE, steps=few).row("b")
    met_metric = met_change = 0
    half_width, found = [], []
    for seed in range(40):
        table = compare({"a": TOGETHER, "b": APART}, trace(100 + seed, 120), PLACE, steps=few,
                        resamples=400)
        assert "parametric" in table.method and table.independent_steps >= TELLING_MIXES
        row = table.row("b")
        met_metric += row.metric_low <= truth.metric <= row.metric_high
        met_change += row.change_low_percent <= truth.change_percent <= row.change_high_percent
        half_width.append((row.metric_high - row.metric_low) / 2)
        found.append(row.metric)
    assert met_metric >= 36 and met_change >= 36
    assert np.median(half_width) < 2 * 1.96 * np.std(found)


def test_steps_without_common_requests_are_independent() -> None:
    """One request per step: the band is the textbook one of the mean of W numbers."""
    request = np.repeat(np.arange(400), 4)
    ids = np.zeros((1600, 1, 1), int)
    apart = RoutingTrace.from_arrays(ids, num_experts=8, request=request)
    steps = StepSampler(tokens=4, order="stored").sample(apart)
    mix = step_mix(apart, steps, np.arange(400))
    assert mix.turnover == pytest.approx(1, abs=0.01) and round(mix.distinct_mixes) == 400
    values = np.random.default_rng(0).standard_normal(400) * 3 + 50
    noise = mean_noise(values, mix, 40_000, 0)
    assert noise is not None
    assert noise.std() == pytest.approx(values.std(ddof=1) / 20, rel=0.05)
    constant = mean_noise(np.full(400, 5.0), mix, 10, 0)
    assert constant is not None and not constant.any()


def test_time_decides_where_a_model_is_given() -> None:
    model = ModelSpec(num_layers=1, num_experts=8, top_k=2, hidden=4096, intermediate=1536)
    table = compare({"now": TOGETHER, "new": APART}, trace(0), PLACE, steps=STEPS, model=model)
    assert table.metric_name == "step_time_us" and " us" in table.verdict
    assert table.row("new").metric == pytest.approx(table.evaluations["new"].step_time_us)


def test_equal_seeds_equal_documents() -> None:
    documents = [
        json.dumps(compare({"a": TOGETHER, "b": APART}, trace(0), PLACE, steps=STEPS, seed=s,
                           resamples=50).to_dict())
        for s in (1, 1, 2)
    ]
    assert documents[0] == documents[1] != documents[2]
    assert json.loads(documents[0])["rows"][0]["name"] == "b"


def test_what_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="at least one plan"):
        compare({}, trace(0), PLACE)
    with pytest.raises(UsageError, match="no plan is called 'x'; there are: a"):
        compare({"a": APART}, trace(0), PLACE, current="x")
    assert compare({"a": APART}, trace(0), PLACE, steps=STEPS).verdict.startswith("a: imbalance")
