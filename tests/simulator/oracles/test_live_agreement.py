"""Predicted against measured: fits, the straggler's residual, and the order of plans."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.oracles.live_agreement import agreement, fit_rank_time, predict_critical_us
from loadmaster.errors import InputError
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.traces.steps import StepSampler

from ..conftest import contiguous_plan
from ..serving.test_replay import spread

STEPS = StepSampler(tokens=200, concurrency=16)


def ranks(trace, cluster, plan, rng, noise=0.0):
    """A made-up machine: 3 us a layer, 5 us an active expert, 0.2 us a token, noisy."""
    loads = step_loads(trace, STEPS.sample(trace), plan, cluster)
    us = 3.0 + 5.0 * loads.active_WLG + 0.2 * loads.tokens_WLG
    return loads, us * np.exp(noise * rng.standard_normal(us.shape))


def test_a_machine_without_noise_is_found_exactly(trace, cluster) -> None:
    loads, us = ranks(trace, cluster, contiguous_plan(), np.random.default_rng(0))
    fit = fit_rank_time(us, loads.active_WLG, loads.tokens_WLG)
    assert fit.token_us == pytest.approx(0.2)
    assert fit.error.worst < 1e-9
    np.testing.assert_allclose(fit.residual_MG, 1.0)


def test_noise_lengthens_the_path_and_the_residual_knows(trace, cluster, model) -> None:
    """Ranks with 20 % noise: the slowest of four is above what any is on average."""
    rng = np.random.default_rng(1)
    loads, us = ranks(trace, cluster, contiguous_plan(), rng, noise=0.2)
    fit = fit_rank_time(us, loads.active_WLG, loads.tokens_WLG)
    truth = ranks(trace, cluster, spread(), rng, noise=0.2)[1].max(axis=2).sum(axis=1)
    steps = STEPS.sample(trace)
    predicted = predict_critical_us({"s": spread()}, trace, steps, cluster, model, fit)["s"]
    assert predicted.mean() == pytest.approx(truth.mean(), rel=0.06)
    loads = step_loads(trace, steps, spread(), cluster)
    blind = fit.start_us + fit.active_us * loads.active_WLG + fit.token_us * loads.tokens_WLG
    assert blind.max(axis=2).sum() < truth.sum()
    assert abs(predicted.sum() - truth.sum()) < abs(blind.max(axis=2).sum() - truth.sum())


def test_orders_beyond_the_band_must_come_out_right() -> None:
    rng = np.random.default_rng(0)
    noise = 1 + 0.01 * rng.standard_normal((3, 40))
    measured = {"a": 100 * noise[0], "b": 110 * noise[1], "c": 110.05 * noise[2]}
    right = agreement({"a": np.full(40, 95.0), "b": np.full(40, 112.0), "c": np.full(40, 111.0)},
                      measured)
    assert right.misordered == () and right.pairs == 2 and right.too_close == 1
    assert right.errors["a"] == pytest.approx(-0.05, abs=0.01)
    wrong = agreement({"a": np.full(40, 120.0), "b": np.full(40, 112.0), "c": np.full(40, 111.0)},
                      measured)
    assert wrong.misordered == (("a", "b"), ("a", "c"))


def test_what_does_not_match_is_refused(trace, cluster, model) -> None:
    loads, us = ranks(trace, cluster, contiguous_plan(), np.random.default_rng(0))
    with pytest.raises(InputError, match="need the same"):
        fit_rank_time(us[:, :2], loads.active_WLG, loads.tokens_WLG)
    with pytest.raises(InputError, match="at least 4 steps"):
        fit_rank_time(us[:2], loads.active_WLG[:2], loads.tokens_WLG[:2])
    with pytest.raises(InputError, match="same plans"):
        agreement({"a": us[0]}, {"b": us[0]})
    fit = fit_rank_time(us, loads.active_WLG, loads.tokens_WLG)
    with pytest.raises(InputError, match="fitted on 4 ranks"):
        fit.critical_us(np.ones((1, 1, 3)))
