"""Overlap schedules: what hides behind what, and what nothing can hide."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.errors import UsageError
from loadmaster.placement.cost.overlap import (
    LayerTimes,
    Overlap,
    fsmoe_case,
    pipeline_us,
    schedule_layer,
    scmoe_slot,
)

TIME = st.floats(min_value=0.0, max_value=1e4, allow_nan=False)


def one(value: float) -> np.ndarray:
    return np.array([[value]])


def layer(overlap, compute: float, dispatch: float, combine: float, **more) -> float:
    return float(schedule_layer(overlap, one(compute), one(dispatch), one(combine), **more)[0, 0])


def test_without_a_schedule_phases_follow_each_other() -> None:
    assert layer(None, 10.0, 3.0, 4.0) == 17.0
    assert layer(Overlap(), 10.0, 3.0, 4.0) == 17.0


def test_serial_tiers_add_up_and_parallel_ones_do_not() -> None:
    tiers = {"dispatch_intra_WL": one(2.0), "combine_intra_WL": one(9.0)}
    assert layer(Overlap(intra_inter="parallel"), 10.0, 3.0, 4.0, **tiers) == 10 + 3 + 9
    assert layer(Overlap(intra_inter="serial"), 10.0, 3.0, 4.0, **tiers) == 10 + 5 + 13


def test_two_batches_hide_the_shorter_of_compute_and_exchange() -> None:
    """100 us of attention and 100 of experts cover 60 + 60 of exchange entirely."""
    assert layer(Overlap("two_batch"), 100.0, 60.0, 60.0, other_us=100.0) == pytest.approx(100.0)
    # Slowed 1.8 times, the links are the longer side: 216 - 100 of attention.
    slowed = Overlap("two_batch", slowdown=1.8)
    assert layer(slowed, 100.0, 60.0, 60.0, other_us=100.0) == pytest.approx(116.0)


def test_two_batches_are_not_used_where_halves_read_all_weights_again() -> None:
    """A decode step whose compute is all weight reads would double it: plain order is kept."""
    plain = 100.0 + 5.0 + 5.0
    split = layer(Overlap("two_batch"), 100.0, 5.0, 5.0, compute_fixed_WL=one(100.0))
    assert split == plain


@pytest.mark.parametrize(
    ("a2a", "ag", "rs", "exp", "gar", "degree", "case"),
    [
        (5.0, 1.0, 1.0, 1.0, 9.0, 4, 1),    # links between nodes bind, gradients exceed ag + rs
        (5.0, 1.0, 1.0, 50.0, 0.0, 4, 2),   # experts bind
        (5.0, 1.0, 1.0, 1.0, 0.0, 4, 3),    # links between nodes bind
        (1.0, 5.0, 5.0, 1.0, 0.0, 4, 4),    # links inside a node bind
    ],
)
def test_all_four_cases_of_fsmoe(a2a, ag, rs, exp, gar, degree, case) -> None:
    assert int(fsmoe_case(a2a, ag, rs, exp, gar, degree)) == case


def _pipeline_by_simulation(a2a: float, ag: float, rs: float, exp: float, r: int) -> float:
    """Chunks through dispatch, ag, experts, rs, combine; two links and one device, in order.

    The slow oracle: the best of all interleavings of dispatches and combines on the shared link.
    """
    best = np.inf
    for first in itertools.product((0, 1), repeat=2 * r):
        if sum(first) != r:
            continue
        best = min(best, _one_order(first, a2a, ag, rs, exp, r))
    return best


def _one_order(first, a2a, ag, rs, exp, r) -> float:
    outer = inner = device = 0.0
    arrived, done = [], []
    sent = combined = 0
    for kind in first:
        if kind == 0:
            outer += a2a
            inner_free = max(outer, inner) + ag
            inner = inner_free
            device = max(device, inner_free) + exp
            arrived.append(device)
            sent += 1
        else:
            if combined >= sent:
                return np.inf
            inner = max(inner, arrived[combined]) + rs
            outer = max(outer, inner) + a2a
            done.append(outer)
            combined += 1
    return done[-1]


@pytest.mark.parametrize(
    ("a2a", "ag", "rs", "exp"), [(5.0, 1.0, 1.0, 30.0), (20.0, 1.0, 1.0, 3.0)]
)
def test_pipeline_formula_is_what_chunks_in_order_take(a2a, ag, rs, exp) -> None:
    """Cases 2 and 3 against every order of the chunks on the links, four chunks."""
    r = 4
    times = LayerTimes(
        compute=one(r * exp), dispatch=one(r * a2a), combine=one(r * a2a),
        dispatch_intra=one(r * ag), combine_intra=one(r * rs),
    )
    formula = float(pipeline_us(times, r)[0, 0])
    assert formula == pytest.approx(_pipeline_by_simulation(a2a, ag, rs, exp, r), rel=0.05)


@given(TIME, TIME, TIME, st.floats(1.0, 2.0))
def test_the_best_degree_never_loses_to_one_chunk(compute, dispatch, combine, slowdown) -> None:
    best = layer(Overlap("pipeline", slowdown=slowdown), compute, dispatch, combine)
    assert best <= layer(Overlap("pipeline", degree=1), compute, dispatch, combine) + 1e-9
    assert best >= compute - 1e-6


@given(TIME, TIME, TIME)
def test_one_chunk_is_the_plain_sum(compute, dispatch, combine) -> None:
    one_chunk = layer(Overlap("pipeline", degree=1), compute, dispatch, combine)
    assert one_chunk == pytest.approx(compute + dispatch + combine)


def test_a_fixed_cost_per_chunk_limits_the_degree() -> None:
    """Chunks that each read all weights do not pay: one chunk is the best degree."""
    best = layer(Overlap("pipeline"), 100.0, 10.0, 10.0, compute_fixed_WL=one(100.0))
    assert best == pytest.approx(120.0)


def test_scmoe_exposes_only_what_the_main_stream_cannot_cover() -> None:
    stream = (40.0, 10.0, 30.0)
    # Dispatch 40 fits before, combine 60 has 40 after it: 20 exposed.
    assert layer(Overlap("scmoe", main_us=stream), 25.0, 40.0, 60.0) == pytest.approx(25 + 20)


def test_scmoe_moves_the_experts_to_where_the_times_fit_best() -> None:
    assert scmoe_slot(10.0, 70.0, (10.0, 30.0, 40.0)) == 1
    assert scmoe_slot(80.0, 0.0, (10.0, 30.0, 40.0)) == 3
    assert scmoe_slot(0.0, 80.0, (10.0, 30.0, 40.0)) == 0


def test_traffic_that_fits_beside_the_experts_costs_nothing() -> None:
    """Weights on the move hide in the links' idle time until they set the pace (case 1)."""
    times = {"compute": one(400.0), "dispatch": one(20.0), "combine": one(20.0)}
    quiet = pipeline_us(LayerTimes(**times), 4)
    beside = pipeline_us(LayerTimes(**times, background=one(50.0)), 4)
    heavy = pipeline_us(LayerTimes(**times, background=one(5000.0)), 4)
    assert beside == quiet
    assert heavy[0, 0] == pytest.approx(5000.0 + 2 * 20.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"schedule": "three_batch"},
        {"degree": 0},
        {"slowdown": 0.5},
        {"slowdown": float("nan")},
        {"schedule": "scmoe"},
        {"main_us": (-1.0,)},
        {"intra_inter": "both"},
    ],
)
def test_an_overlap_that_cannot_be_is_refused(bad) -> None:
    with pytest.raises(UsageError, match="overlap"):
        Overlap(**bad)
