"""Divergence in bits, and what chance alone would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loadmaster.errors import InputError
from loadmaster.traces.analysis.drift import drift, entropy_bits, jsd_bits, split_half_floor
from loadmaster.traces.formats import import_any
from loadmaster.traces.profile import Profile
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.traces.trace import RoutingTrace

loads = hnp.arrays(np.float64, (3, 6), elements=st.floats(0, 100)).filter(
    lambda a: (a.sum(axis=1) > 0).all()
)


def test_known_divergences() -> None:
    """0 for equal shares, 1 for disjoint ones, and a value worked out by hand."""
    assert jsd_bits([1, 1], [10, 10]) == 0
    assert jsd_bits([1, 0], [0, 5]) == 1
    # halves (3/4, 1/4): H = 0.8113; (1 + 0.8113 = H of the parts) / 2
    p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    assert jsd_bits(p, q) == pytest.approx(0.811278 - 0.5, abs=1e-6)


@given(loads, loads)
def test_a_divergence_is_symmetric_and_between_0_and_1(p: Any, q: Any) -> None:
    """And does not care for scale; zero with itself."""
    bits = jsd_bits(p, q)
    assert ((bits >= 0) & (bits <= 1)).all()
    assert np.allclose(bits, jsd_bits(q, p)) and np.allclose(bits, jsd_bits(3 * p, q), atol=1e-12)
    assert np.allclose(jsd_bits(p, p), 0, atol=1e-12)


def test_a_row_without_load_has_no_divergence() -> None:
    assert np.isnan(jsd_bits([[0, 0], [1, 1]], [[1, 1], [1, 1]])).tolist() == [True, False]


def test_entropy_of_equal_shares_is_the_logarithm() -> None:
    assert entropy_bits(np.full(8, 1 / 8)) == pytest.approx(3)
    assert entropy_bits([1.0, 0.0]) == 0


def test_the_same_traffic_does_not_drift_and_another_domain_does() -> None:
    """Two halves of one domain are within chance; two domains are far above the floor."""
    trace: Any = synth_trace(
        layers=3, experts=16, top_k=2, tokens=20_000, domains=2, request_tokens=50, seed=1
    )
    one, other = trace.slice_domains([0]), trace.slice_domains([1])
    a, b = one.split(0.5)
    same: Any = drift(a, b)
    moved: Any = drift(one, other)
    assert same.moved is False and same.bits < 3 * same.floor_bits
    assert moved.moved is True and moved.bits > 10 * moved.floor_bits
    assert moved.bits == pytest.approx(float(np.mean(moved.bits_L)))
    assert moved.worst_layer == int(np.argmax(moved.bits_L))


def test_requests_that_are_alike_raise_the_floor() -> None:
    """Tokens of one request route alike: splitting by token would hide that noise."""
    rng = np.random.default_rng(0)

    favourite = rng.integers(0, 8, 100)
    ids = np.repeat(favourite, 50).reshape(-1, 1, 1)
    by_request = RoutingTrace.from_arrays(ids, num_experts=8, request=np.repeat(range(100), 50))
    by_token = RoutingTrace.from_arrays(ids, num_experts=8, request=rng.permutation(5000))
    assert split_half_floor(by_request) > 10 * split_half_floor(by_token)


def test_chance_is_rarely_called_drift() -> None:
    """Two draws from the same distribution: at 5 % few of 40 pairs may be called moved."""
    called = 0
    for seed in range(40):
        trace = synth_trace(
            layers=2, experts=8, top_k=1, tokens=3000, request_tokens=40, seed=seed
        )
        called += bool(drift(*trace.split(0.5, seed=seed), seed=seed, shuffles=60).moved)
    assert called <= 6


def test_load_only_profiles_can_drift_too() -> None:
    """Windows stand for requests; a single window has no floor."""
    rng = np.random.default_rng(0)
    loads = rng.poisson(50, (10, 2, 4)) * np.array([4, 2, 1, 1])
    a, b = Profile.from_loads(loads), Profile.from_loads(loads[:, :, ::-1])
    assert drift(a, b).moved is True
    single = drift(Profile.from_loads(loads[0]), Profile.from_loads(loads[1]))
    assert single.floor_bits is None and single.moved is None
    with pytest.raises(InputError, match="at least 2"):
        split_half_floor(Profile.from_loads(loads[0]))


def test_other_models_cannot_be_compared(make_trace: Any) -> None:
    with pytest.raises(InputError, match="different models"):
        drift(make_trace(), make_trace(experts=9))


def test_the_published_divergence_of_two_domains(real_data: Path) -> None:
    """DeepSeek-V2-Lite, law against translation: 0.188 bits, split halves 0.002."""
    trace: Any = import_any(real_data / "routing/esft_law_translation.npz").trace
    found = drift(trace.slice_domains(["law"]), trace.slice_domains(["translation"]))
    assert found.bits == pytest.approx(0.188, abs=0.001)
    assert found.floor_bits == pytest.approx(0.002, abs=0.001)
