"""Timed exchanges come as rows that the fits of `simulator/calibrate/fits.py` take."""

from __future__ import annotations

import pytest

from loadmaster.errors import UsageError
from loadmaster.simulator.calibrate.fits import exchange_rows_from, fit_exchange
from loadmaster.workers.calibrate.exchange_bench import measure_exchange


def test_measured_rows_are_fitted() -> None:
    times = measure_exchange(2, (4096, 65536, 262144, 1048576), repeats=3)
    assert [r["port_bytes"] for r in times.rows] == [2048, 32768, 131072, 524288]
    assert times.counts_us > 0
    assert all(r["latency_us"] > 0 for r in times.rows)
    fit = fit_exchange(exchange_rows_from(times.rows))
    assert fit.bytes_per_s > 0


def test_an_exchange_takes_two() -> None:
    with pytest.raises(UsageError, match="2 ranks"):
        measure_exchange(1)
