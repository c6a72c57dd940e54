"""A link's fit: parameters come back, and what cannot be fitted is refused."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.errors import InputError
from loadmaster.simulator.calibrate.fits import ExchangeRows, exchange_rows_from, fit_exchange
from loadmaster.simulator.calibrate.machine_profile import fit_table


def exchange_rows(nodes, port_bytes, alpha=20.0, per_node=4.0, rate=50e9) -> ExchangeRows:
    nodes, port_bytes = np.asarray(nodes, float), np.asarray(port_bytes, float)
    us = alpha + per_node * np.log2(nodes) + port_bytes / rate * 1e6
    return ExchangeRows(nodes, port_bytes, us)


def test_exact_rows_give_their_parameters_back() -> None:
    fit = fit_exchange(exchange_rows([2, 2, 4, 4, 8, 8], [1e4, 1e7, 1e5, 1e6, 1e4, 2e7]))
    assert fit.alpha_us == pytest.approx(20.0)
    assert fit.alpha_per_log2_node_us == pytest.approx(4.0)
    assert fit.bytes_per_s == pytest.approx(50e9)
    assert fit.error.worst < 1e-9


def test_a_plateau_is_kept_by_the_table_and_lost_by_the_line() -> None:
    """NCCL's shape: flat, then linear."""
    size = 2.0 ** np.arange(10, 26)
    us = np.maximum(14.0, size / 3e5)
    rows = ExchangeRows(np.ones(16), size, us)
    table_bytes, table_us = fit_table(rows.port_bytes, rows.us)
    np.testing.assert_allclose(np.interp(size, table_bytes, table_us), us)
    assert fit_exchange(rows).error.worst > 0.2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"nodes": 2, "port_bytes": "many", "latency_us": 1}], "row 0: column port_bytes"),
        ([{"nodes": 2, "port_bytes": 1, "latency_us": 0}], "a time is above 0"),
        ([{"nodes": 2, "latency_us": 1}], "column port_bytes holds None"),
        ([{"nodes": float("nan"), "port_bytes": 1, "latency_us": 1}], "column nodes"),
    ],
)
def test_a_bad_row_is_named(rows, message) -> None:
    with pytest.raises(InputError, match=message):
        exchange_rows_from(rows)


def test_one_size_shows_no_rate() -> None:
    with pytest.raises(InputError, match="do not show a rate"):
        fit_exchange(ExchangeRows(np.ones(3), np.zeros(3), np.ones(3)))
