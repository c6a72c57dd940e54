"""Paired bands over requests: as wide as they must be, and no wider."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.simulator.serving.paired_difference import set_side_by_side


def ar1(rng: np.random.Generator, size: int, rho: float) -> np.ndarray:
    """Noise whose neighbours resemble each other, as requests of one queue do; variance 1."""
    out = np.empty(size)
    out[0] = rng.standard_normal()
    for i, shock in enumerate(rng.standard_normal(size - 1) * np.sqrt(1 - rho**2), start=1):
        out[i] = rho * out[i - 1] + shock
    return out


def test_a_shared_burden_cancels_out() -> None:
    """Latencies vary by thousands, the difference is 5 for every request: found, with no doubt."""
    load_R = np.random.default_rng(0).uniform(1e3, 9e3, 200)
    paired = set_side_by_side({"a": load_R + 5.0, "b": load_R}, 1.0)
    row = paired.row("a")
    assert paired.best == "b" and not row.indistinguishable
    assert row.low_us == pytest.approx(5.0) and row.high_us == pytest.approx(5.0)
    assert "a is 0.1 % slower" in paired.verdict()


def test_equal_plans_are_indistinguishable_and_ties_keep_their_order() -> None:
    load_R = np.random.default_rng(0).uniform(1e3, 9e3, 50)
    paired = set_side_by_side({"x": load_R, "y": load_R.copy()}, 3.0)
    assert [row.name for row in paired.rows] == ["x", "y"]
    assert paired.row("y").indistinguishable
    assert "indistinguishable from it: y" in paired.verdict()


def test_few_requests_are_not_enough_data() -> None:
    paired = set_side_by_side({"x": np.array([1.0, 2.0]), "y": np.array([2.0, 3.0])}, 1.0)
    assert paired.verdict().startswith("not enough data: x came out best")
    assert paired.to_dict()["rows"][1]["high_us"] is None


def test_the_same_seed_gives_the_same_bands() -> None:
    rng = np.random.default_rng(1)
    latency = {"x": rng.uniform(1, 2, 100), "y": rng.uniform(1, 2, 100)}
    first, again, other = (set_side_by_side(latency, 4.0, seed=s).to_dict() for s in (0, 0, 1))
    assert first == again and first["rows"] != other["rows"]


def test_overlapping_requests_are_drawn_in_stretches_and_said_where_that_is_not_enough() -> None:
    latency = {"x": np.ones(1000), "y": np.ones(1000) * 2}
    assert set_side_by_side(latency, 40.2).block == 80
    crowded = set_side_by_side(latency, 800.0)
    assert crowded.block == 100 and "serve more requests" in crowded.notes[0]


@pytest.mark.parametrize(("rho", "in_flight"), [(0.0, 1.0), (0.9, 40.0)])
def test_bands_hold_zero_as_often_as_they_say(rho: float, in_flight: float) -> None:
    """No true difference: 95 % of bands hold zero, correlated neighbours or not (± 4 %)."""
    rng, held, runs = np.random.default_rng(3), 0, 200
    for seed in range(runs):
        base = rng.uniform(100, 200, 1500)
        paired = set_side_by_side(
            {"a": base, "b": base + ar1(rng, 1500, rho)}, in_flight, seed=seed
        )
        held += paired.rows[1].indistinguishable
    assert held / runs == pytest.approx(0.95, abs=0.04)
