"""Intervals: as scipy computes them, and as often right as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from loadmaster.placement.comparison.intervals import (
    BOTH_SIDES,
    CONFIDENCE,
    NORMAL_REACH,
    band,
    few_draws_factor,
    standard_error,
    t_reach,
)


@pytest.mark.parametrize("n", [2, 3, 10, 500])
def test_students_t_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    low, high = stats.t.interval(
        CONFIDENCE, n - 1, loc=values.mean(), scale=stats.sem(values)
    )
    assert t_reach(values) == pytest.approx((high - low) / 2, rel=1e-12)
    assert standard_error(values) == pytest.approx(stats.sem(values), rel=1e-12)
    alone = stats.t.ppf(CONFIDENCE, n - 1) * stats.sem(values)
    assert t_reach(values, CONFIDENCE) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("n", [3, 8])
def test_students_t_holds_the_truth_as_often_as_it_says(n: int) -> None:
    values = np.random.default_rng(0).standard_normal((4000, n))
    held = np.mean([abs(row.mean()) <= t_reach(row) for row in values])
    assert held == pytest.approx(CONFIDENCE, abs=0.01)


@pytest.mark.parametrize("n", [4, 12])
def test_a_widened_bootstrap_of_few_holds_the_truth_about_as_often(n: int) -> None:
    """Without the factor four values hold it four times in five."""
    rng = np.random.default_rng(1)
    plain, widened = 0, 0
    for row in rng.standard_normal((1500, n)):
        noise = row[rng.integers(0, n, (200, n))].mean(axis=1) - row.mean()
        plain += abs(row.mean()) <= band(0.0, noise)[1]
        widened += abs(row.mean()) <= band(0.0, noise * few_draws_factor(n))[1]
    assert plain / 1500 < 0.93 and widened / 1500 == pytest.approx(CONFIDENCE, abs=0.03)


def test_many_draws_need_no_widening() -> None:
    assert few_draws_factor(10**6) == pytest.approx(1.0, abs=1e-5)
    assert stats.norm.ppf(BOTH_SIDES) == pytest.approx(NORMAL_REACH, abs=1e-4)


def test_a_band_is_symmetric_and_endless_where_nothing_is_known() -> None:
    assert band(3.0, np.array([-1.0, 1.0, 1.0, -1.0])) == (2.0, 4.0)
    assert band(3.0, None) == (-np.inf, np.inf)
