"""The serving loop is a queue: formulas and recursions agree with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.oracles.queueing import Queue, waits_by_recursion, waits_of_loop


@pytest.mark.parametrize("service", ["exponential", "deterministic", "lognormal"])
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_server_waits_as_lindley_says(service, load) -> None:
    """Request by request, to the nanosecond."""
    arrival, wait = Queue(service, load=load).draw(3_000, seed=4)
    np.testing.assert_array_equal(waits_of_loop(arrival, wait), waits_by_recursion(arrival, wait))


@pytest.mark.parametrize("servers", [2, 5])
def test_several_servers_share_one_queue(servers) -> None:
    """First come, first served, and no server idles while a request waits."""
    arrival, service = Queue("exponential", servers, 0.8).draw(3_000, seed=4)
    np.testing.assert_array_equal(
        waits_of_loop(arrival, service, servers), waits_by_recursion(arrival, service, servers)
    )


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=40),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_arrivals_even_at_the_same_instant(requests, servers) -> None:
    arrival = np.cumsum([gap for gap, _ in requests]).astype(np.int64)
    service = np.array([s for _, s in requests], np.int64)
    np.testing.assert_array_equal(
        waits_of_loop(arrival, service, servers), waits_by_recursion(arrival, service, servers)
    )


def test_long_run_wait_is_the_formula() -> None:
    """M/M/1 at load 0.5; benchmarks/simulator.py does the long runs of all four kinds."""
    queue = Queue("exponential", load=0.5)
    arrival, service = queue.draw(60_000, seed=1)
    mean_ns = waits_of_loop(arrival, service).mean()
    assert mean_ns == pytest.approx(queue.mean_wait_ns(), rel=0.05)


def test_closed_forms_at_points_worked_by_hand() -> None:
    """M/M/1 at 0.5 waits one service; M/D/1 half of it; M/M/2 at 0.5 a third."""
    assert Queue("exponential", 1, 0.5).mean_wait_ns() == pytest.approx(1e6)
    assert Queue("deterministic", 1, 0.5).mean_wait_ns() == pytest.approx(0.5e6)
    assert Queue("exponential", 2, 0.5).mean_wait_ns() == pytest.approx(1e6 / 3)
