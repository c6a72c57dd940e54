"""Workloads: checked at the door, shifted and mixed without touching what was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.errors import InputError, UsageError
from loadmaster.simulator.serving.token_source import TokenSource
from loadmaster.simulator.serving.workload import Workload, as_workload
from loadmaster.traces.arrivals import gamma, poisson

from ..conftest import skewed_trace, steady_workload


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], [], []), "arrival_us must list at least one"),
        (([0.0, -1.0], [1, 1], [1, 1]), "arrival_us: request 1: -1.0 is negative"),
        (([5.0, 4.0], [1, 1], [1, 1]), "arrival_us: request 1: 4.0 is before"),
        (([0.0, np.nan], [1, 1], [1, 1]), "arrival_us: request 1: nan"),
        (([0.0, 1.0], [1, 0], [1, 1]), "prompt_tokens: request 1: 0 is below 1"),
        (([0.0], [1], [1, 2]), "output_tokens lists 2 requests, the arrivals 1"),
        (([0.0], [1.5], [1]), "prompt_tokens must be whole numbers"),
    ],
)
def test_bad_arrivals_name_field_and_request(columns, message) -> None:
    with pytest.raises(InputError, match=message):
        Workload.from_arrays(*columns)


def test_arrivals_of_the_traces_floor_are_taken_as_they_are() -> None:
    arrivals = poisson(50, 10.0, seed=3)
    load = as_workload(arrivals)
    np.testing.assert_array_equal(load.arrival_ns, arrivals.time_us * 1000)
    assert as_workload(load) is load


def test_parts_and_rates() -> None:
    load = Workload.from_arrays([0.0, 10.0, 20.0], [1, 2, 3], [4, 5, 6])
    assert load.until(15.0).prompt_tokens.tolist() == [1, 2]
    assert load.scaled(2.0).arrival_ns.tolist() == [0, 5000, 10000]
    with pytest.raises(InputError, match="no request arrives before"):
        load.until(0.0)
    with pytest.raises(InputError, match="rate"):
        load.scaled(0.0)


def test_the_mix_of_domains_changes_at_its_times() -> None:
    load = Workload.from_arrays(np.arange(400.0), np.ones(400, int), np.ones(400, int))
    mixed = load.with_domains(("a", "b"), [(0.0, (1, 0)), (100.0, (0, 1)), (300.0, (1, 1))])
    assert (mixed.domain[:100] == 0).all() and (mixed.domain[100:300] == 1).all()
    assert 0.3 < mixed.domain[300:].mean() < 0.7
    with pytest.raises(InputError, match="shares"):
        load.with_domains(("a", "b"), [(0.0, (1,))])


def test_a_burst_adds_copies_in_its_window_only() -> None:
    load = steady_workload(requests=100, gap_us=10.0)
    burst = load.with_burst(200.0, 400.0, times=3)
    inside = (load.arrival_ns >= 200_000) & (load.arrival_ns < 400_000)
    assert len(burst) == 100 + 2 * inside.sum()
    assert (np.diff(burst.arrival_ns) >= 0).all()
    added = np.setdiff1d(burst.arrival_ns, load.arrival_ns)
    assert (added >= 200_000).all() and (added <= 400_000).all()
    with pytest.raises(InputError, match="burst"):
        load.with_burst(1e9, 2e9, times=3)


def test_a_requests_tokens_come_from_its_own_domain_in_order() -> None:
    trace = skewed_trace(1_000)
    load = steady_workload(30).with_domains(("front", "back"), [(0.0, (1, 1))])
    source = TokenSource(trace, load, seed=0)
    for r in range(30):
        tokens = source.prompt(r, 0, 40)
        assert (trace.domain[tokens] == load.domain[r]).all()
        steps = np.diff(tokens)
        assert ((steps == 1).sum() >= 38) or (steps > 0).mean() > 0.9
        late = source.prompt(r, 10, 5)
        np.testing.assert_array_equal(late, tokens[10:15])


def test_an_answer_reads_on_where_the_prompt_stopped() -> None:
    trace = skewed_trace(1_000)
    load = steady_workload(5)
    source = TokenSource(trace, load, seed=0)
    prompt = int(load.prompt_tokens[2])
    read_on = source.prompt(2, prompt, 3)
    answers = [int(source.answers(np.array([2]), np.array([w]))[0]) for w in range(3)]
    assert answers == read_on.tolist()


@pytest.mark.parametrize(
    ("arrival_ns", "prompt", "output", "message"),
    [
        ([5000, 1000], [1, 1], [1, 1], "arrival_ns: request 1: 1000 is before"),
        ([-7, 1000], [1, 1], [1, 1], "arrival_ns: request 0: -7 is negative"),
        ([0, 1000], [1, 0], [1, 1], "prompt_tokens: request 1: 0 is below 1"),
        ([0, 1000], [1, 1], [-3, 1], "output_tokens: request 0: -3 is below 1"),
        ([0, 1000], [1], [1, 1], "prompt_tokens lists 1 requests"),
        ([0.5, 1000.0], [1, 1], [1, 1], "whole nanoseconds"),
        (np.zeros(0, np.int64), [], [], "at least one request"),
    ],
)
def test_a_workload_made_by_hand_is_checked_too(arrival_ns, prompt, output, message) -> None:
    with pytest.raises(InputError, match=message):
        Workload(np.array(arrival_ns), np.array(prompt), np.array(output))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.head(0),
        lambda w: w.head(-1),
        lambda w: w.until(float("nan")),
        lambda w: w.scaled(float("nan")),
        lambda w: w.scaled(1e-300),
        lambda w: w.with_burst(0.0, float("nan"), 2),
        lambda w: w.with_domains(("a", "b"), [(0.0, (float("nan"), 1.0))]),
        lambda w: w.with_domains(("a", "b"), [(float("nan"), (1.0, 1.0))]),
    ],
)
def test_a_change_that_cannot_be_is_refused(change) -> None:
    with pytest.raises(InputError, match=r"head|until|rate|burst|shares"):
        change(Workload.from_arrays([0.0, 5.0], [1, 2], [3, 4]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_rate_that_is_no_number_is_refused(bad) -> None:
    with pytest.raises(UsageError, match="rate_per_s"):
        gamma(3, bad)
    with pytest.raises(UsageError, match="positive factor"):
        gamma(3, 1.0).scaled(bad)
