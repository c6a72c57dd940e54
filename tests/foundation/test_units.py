"""Figures for people: three digits and the unit an engineer would say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.foundation.units import change, digits, duration, percent, size


@pytest.mark.parametrize(("us", "text"), [
    (28_538.248, "28.5 ms"), (412.0, "412 us"), (0.25, "250 ns"), (1_200_000.0, "1.20 s"),
    (858e6, "14.3 min"), (7.2e9, "2.00 h"), (0.0, "0 s"), (999.9, "1.00 ms"), (-5e3, "-5.00 ms"),
    (None, "-"), (math.nan, "-"), (math.inf, "-"),
])
def test_times_from_microseconds(us: float | None, text: str) -> None:
    assert duration(us) == text


@pytest.mark.parametrize(("num_bytes", "text"), [
    (312, "312 B"), (17_694_720, "17.7 MB"), (999_999, "1.00 MB"), (1e15, "1.00 PB"), (0, "0 B"),
    (None, "-"),
])
def test_sizes_are_powers_of_a_thousand(num_bytes: float | None, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(("value", "text"), [
    (1234.5, "1,234"), (0.012345, "0.0123"), (99.96, "100"), (0.0, "0"), (1e-9, "1.00e-09"),
    (3.5e13, "3.50e+13"), (-2.5, "-2.50"), (None, "-"),
])
def test_three_digits(value: float | None, text: str) -> None:
    assert digits(value) == text


def test_shares_and_changes() -> None:
    assert percent(0.12345) == "12.3 %" and percent(None) == "-"
    assert change(-4.21, -4.8, -3.6) == "-4.2 ± 0.6 %"
    assert change(1.0, -math.inf, math.inf) == "+1.0 ± ? %"


@given(st.floats(1e-3, 3.6e12))
def test_a_time_reads_back_within_its_digits(us: float) -> None:
    value, unit = duration(us).split()
    scale = {"ns": 1e-3, "us": 1, "ms": 1e3, "s": 1e6, "min": 60e6, "h": 3600e6}[unit]
    assert float(value.replace(",", "")) * scale == pytest.approx(us, rel=6e-3)
