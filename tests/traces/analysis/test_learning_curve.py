"""How many tokens a plan needs: measured on requests held back, not asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InputError, UsageError
from loadmaster.traces.analysis.learning_curve import learning_curve, residual_imbalance
from loadmaster.traces.formats import import_any
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.traces.trace import RoutingTrace


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return synth_trace(
        layers=4, experts=32, top_k=4, tokens=40_000, zipf=0.6, request_tokens=100, seed=2
    )


def packed_imbalance(plan_from: RoutingTrace, held_out: RoutingTrace, devices: int = 8) -> float:
    """What a packed plan is worth: heaviest expert first onto the lightest device with room."""
    worst = []
    for planned, unseen in zip(plan_from.load_LE(), held_out.load_LE(), strict=True):
        load, count, real = np.zeros(devices), np.zeros(devices), np.zeros(devices)
        for expert in np.argsort(-planned, kind="stable"):
            room = np.where(count < len(planned) // devices, load, np.inf)
            device = int(np.argmin(room))
            load[device] += planned[expert]
            real[device] += unseen[expert]
            count[device] += 1
        worst.append(real.max() / real.mean())
    return float(np.mean(worst))


def test_more_tokens_make_a_better_plan(trace: RoutingTrace) -> None:
    """The curve falls towards 1, ends with everything there is, and repeats with its seed."""
    curve = learning_curve(trace, seed=5)
    assert curve.tokens[:3] == (256, 512, 1024) and 18_000 < curve.tokens[-1] < 22_000
    assert curve.imbalance[0] > curve.imbalance[3] > curve.imbalance[-1] > 1
    assert curve == learning_curve(trace, seed=5)


def test_the_proxy_follows_a_packed_plan() -> None:
    """Where packing itself loses little, the proxy is what heaviest-first packing gets, unseen."""
    mild = synth_trace(layers=4, experts=32, top_k=4, tokens=40_000, zipf=0.1, block_share=0.3,
                       request_tokens=100, seed=2)
    proxy, packed = learning_curve(mild), learning_curve(mild, judge=packed_imbalance)
    assert packed.judged_by == "the judge handed in"
    assert proxy.imbalance == pytest.approx(packed.imbalance, abs=0.015)


def test_the_published_curve_of_gpt_oss(real_data: Path) -> None:
    """The data's own table for packed plans: 1.23 from 4,096 tokens, 1.12 from 16,384."""
    trace: Any = import_any(real_data / "routing/gptoss20b_decode.npz").trace
    curve = learning_curve(trace)
    at = dict(zip(curve.tokens, curve.imbalance, strict=True))
    assert at[4096] == pytest.approx(1.23, abs=0.03)
    assert at[16384] == pytest.approx(1.12, abs=0.02)


def test_a_long_trace_is_long_enough_and_its_beginning_is_not(trace: RoutingTrace) -> None:
    """The needed number of tokens is about the same from either."""
    long = learning_curve(trace)
    short = learning_curve(trace.select(np.arange(3000)))
    assert long.long_enough and "long enough" in long.verdict
    assert not short.long_enough and "too short" in short.verdict
    assert 1 / 4 < short.needed_tokens / long.needed_tokens < 4


def test_long_enough_is_said_only_where_the_table_shows_it(trace: RoutingTrace) -> None:
    """A judge whose last doubling still buys more than the tolerance, though a curve through all
    points is flat: the last row of the table is what a reader sees."""
    worth = dict.fromkeys((256, 512, 1024, 2048, 4096, 8192), 1.2)

    def judge(plan_from: RoutingTrace, held_out: RoutingTrace) -> float:
        return worth.get(plan_from.num_tokens, late)

    late = 1.16
    assert not learning_curve(trace, judge=judge).long_enough
    assert "too short" in learning_curve(trace, judge=judge).verdict
    late = 1.196
    assert learning_curve(trace, judge=judge).long_enough


def test_no_error_is_no_imbalance() -> None:
    """Loads that were planned exactly stay balanced, whatever experts share a device."""
    load = np.random.default_rng(0).integers(1, 100, (3, 16))
    assert residual_imbalance(load, 7 * load, devices=4) == pytest.approx(1)


def test_a_known_error_gives_a_known_imbalance() -> None:
    """One expert per device: the hottest unseen share over the planned one, in device means."""
    planned, unseen = [[1, 1, 1, 1]], [[3, 2, 2, 1]]
    assert residual_imbalance(planned, unseen, devices=4) == pytest.approx(1 + 4 * (3 / 8 - 1 / 4))


def test_layers_without_load_are_left_out() -> None:
    assert residual_imbalance([[0, 0], [1, 1]], [[5, 0], [1, 1]], devices=2) == 1
    assert residual_imbalance([[0, 0]], [[1, 1]], devices=2) == 1


def test_a_trace_too_short_says_so(make_trace: Any) -> None:
    with pytest.raises(InputError, match="too few for a learning curve"):
        learning_curve(make_trace())
    with pytest.raises(InputError, match="one request"):
        learning_curve(make_trace(tokens=10))
    with pytest.raises(UsageError, match="devices"):
        learning_curve(make_trace(), devices=0)
