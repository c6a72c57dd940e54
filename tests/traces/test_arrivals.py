"""Arrivals from processes, and what cannot be arrivals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InputError, UsageError
from loadmaster.traces.arrivals import Arrivals, Length, gamma, poisson


def gaps_cv(arrivals: Arrivals) -> float:
    gaps = np.diff(arrivals.time_us)
    return float(gaps.std() / gaps.mean())


@pytest.mark.parametrize(("cv", "tolerance"), [(0.5, 0.02), (1.0, 0.02), (3.0, 0.2)])
def test_gamma_gaps_have_the_rate_and_spread_asked_for(cv: float, tolerance: float) -> None:
    made = gamma(40_000, 20.0, cv=cv, seed=1)
    assert made.rate_per_s == pytest.approx(20, rel=0.05)
    assert gaps_cv(made) == pytest.approx(cv, abs=tolerance)


def test_a_metronome_has_equal_gaps() -> None:
    assert gamma(5, 2.0, cv=0).time_us.tolist() == [500_000 * i for i in range(1, 6)]


def test_poisson_counts_have_equal_mean_and_variance() -> None:
    """The property that makes it Poisson: counts per second."""
    made = poisson(50_000, 10.0, seed=2)
    counts = np.bincount(made.time_us // 1_000_000)[1:-1]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.08)


def test_lengths_have_the_mean_and_spread_asked_for() -> None:
    made = poisson(40_000, 5.0, prompt=Length(800, 0.5), output=Length(100), seed=3)
    assert made.prompt_tokens.mean() == pytest.approx(800, rel=0.02)
    assert made.prompt_tokens.std() / 800 == pytest.approx(0.5, abs=0.02)
    assert set(made.output_tokens) == {100}
    assert Length(1, 3.0).sample(np.random.default_rng(0), 1000).min() == 1


def test_other_lengths_leave_the_times_alone() -> None:
    """Separate random streams: a comparison over lengths is paired in time."""
    a = poisson(100, 5.0, prompt=Length(800), seed=4)
    b = poisson(100, 5.0, prompt=Length(80, 2.0), seed=4)
    assert np.array_equal(a.time_us, b.time_us)
    assert np.array_equal(a.output_tokens, b.output_tokens)


def test_a_scaled_rate_keeps_the_requests() -> None:
    made = poisson(100, 5.0, seed=5)
    assert made.scaled(2).rate_per_s == pytest.approx(2 * made.rate_per_s, rel=1e-3)
    assert np.array_equal(made.scaled(2).prompt_tokens, made.prompt_tokens)


@pytest.mark.parametrize(
    "make", [lambda: poisson(0, 1.0), lambda: poisson(1, 0.0), lambda: gamma(1, 1.0, cv=-1),
             lambda: Length(0.5), lambda: poisson(2, 1.0).scaled(0)],
)
def test_processes_that_cannot_be_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([0, 5], [1, 1], [1]), "equally many"),
        (([], [], []), "at least one request"),
        (([5, 0], [1, 1], [1, 1]), "request 1 is before"),
        (([0, 5], [1, -1], [1, 1]), "prompt_tokens of request 1 is -1"),
    ],
)
def test_arrays_that_cannot_be_arrivals_are_named(columns: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        time_us, prompt, output = (np.array(c, np.int64) for c in columns)
        Arrivals(time_us, prompt, output)
