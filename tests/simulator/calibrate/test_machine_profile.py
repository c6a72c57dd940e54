"""Tables of what was timed on a machine, and the profile made of them."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.errors import InputError
from loadmaster.simulator.calibrate.fits import ExchangeRows
from loadmaster.simulator.calibrate.machine_profile import (
    fit_expert_table,
    fit_table,
    machine_profile,
)

SIZES = {"flops_per_assignment": 1e6, "expert_bytes": 1e6}


def calls(each_us, *, start_us=0.0, active=(4, 8)):
    """(tokens, active, us): calls whose experts take `each_us[tokens]`, after a start."""
    rows = [(t, a, start_us + a * us) for t, us in each_us.items() for a in active]
    return tuple(np.array(column, float) for column in zip(*rows, strict=True))


def test_a_table_rises_and_keeps_medians() -> None:
    tokens, us = fit_table([1, 1, 1, 8, 64], [5.0, 6.0, 50.0, 4.0, 20.0])
    assert tokens == (1.0, 8.0, 64.0)
    assert us == (5.0, 5.0, 20.0), "6 and 4 pooled"


def test_start_and_table_come_back_from_exact_calls() -> None:
    compute, _ = fit_expert_table(*calls({1: 20.0, 64: 25.0, 512: 90.0}, start_us=7.0), **SIZES)
    assert compute.start_us == pytest.approx(7.0)
    assert compute.expert_table_tokens == (1.0, 64.0, 512.0)
    assert compute.expert_table_us == pytest.approx((20.0, 25.0, 90.0))


def test_one_number_of_active_experts_shows_no_start() -> None:
    compute, _ = fit_expert_table(
        *calls({1: 20.0, 64: 25.0, 512: 90.0}, active=(8,)), **SIZES
    )
    assert compute.start_us == 0.0


def test_the_error_is_of_counts_left_out() -> None:
    _, error = fit_expert_table(*calls({1: 20.0, 64: 25.0, 512: 90.0}), **SIZES)
    # 64 tokens from their neighbours: 20 + 63 / 511 x 70 us against 25 measured.
    assert error.rows == 2
    assert error.median == pytest.approx((20 + 63 / 511 * 70) / 25 - 1)


def test_an_error_between_points_needs_points_between() -> None:
    with pytest.raises(InputError, match="2 token counts: an error needs at least 3"):
        fit_expert_table(*calls({1: 20.0, 64: 25.0}), **SIZES)


def test_a_machine_gets_a_profile_with_its_errors() -> None:
    compute, error = fit_expert_table(*calls({1: 20.0, 64: 25.0, 512: 90.0}), **SIZES)
    sizes = np.array([1e3, 1e6])
    profile = machine_profile(
        name="box", compute=compute, compute_error=error, memory_bytes=2**33,
        exchange=ExchangeRows(np.ones(2), sizes, 20.0 + sizes / 1e9 * 1e6),
    )
    assert profile.compute == compute
    assert profile.dispatch.nvlink_bytes_per_s == pytest.approx(1e9)
    assert f"left out of the fit: {error}" in profile.error
    assert profile.source == "measured on this machine"
