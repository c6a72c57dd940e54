"""What `trace info` answers, from a trace, a path or loads alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.traces.analysis.summary import trace_info
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.synth.generate import synth_trace


def test_a_trace_is_counted_in_every_way(tmp_path: Path) -> None:
    """Shape, tokens per phase and domain, skew, steps, floor and the curve; all of it JSON."""
    trace: Any = synth_trace(
        layers=2, experts=16, top_k=2, tokens=6000, domains=2, request_tokens=50, seed=1
    )
    save_trace(trace, tmp_path / "t")
    info: Any = trace_info(tmp_path / "t", steps=StepSampler(tokens=100, concurrency=4))
    assert (info.tokens, info.layers, info.experts, info.top_k) == (6000, 2, 16, 2)
    assert sum(info.tokens_by_phase.values()) == sum(info.tokens_by_domain.values()) == 6000
    assert info.requests == len(np.unique(trace.request)) and info.recorded_steps is None
    assert info.steps_available == len(StepSampler(tokens=100, concurrency=4).sample(trace))
    load = trace.load_LE()
    assert info.skew_L == pytest.approx(load.max(1) / load.mean(1))
    assert 0 < info.floor_bits < 0.05 and info.curve.tokens[0] == 256
    out = json.loads(json.dumps(info.to_dict()))
    assert out["verdict"] == info.curve.verdict
    assert out["learning_curve"]["points"][0]["tokens"] == 256


def test_a_judge_is_used_when_handed_in(make_trace: Any) -> None:
    info: Any = trace_info(make_trace(tokens=3000), judge=lambda plan, held: 1.25)
    assert set(info.curve.imbalance) == {1.25} and info.curve.judged_by == "the judge handed in"


def test_a_short_trace_is_described_all_the_same(make_trace: Any) -> None:
    """Too few tokens for steps or a curve is an answer, not a failure."""
    info: Any = trace_info(make_trace())
    assert info.tokens == 200 and info.steps_available == 0 and info.curve is None
    assert "do not fill one step" in info.verdict


def test_loads_alone_are_described_as_such() -> None:
    info: Any = trace_info(Profile.from_loads([[4, 2], [3, 3]], top_k=1))
    assert (info.tokens, info.steps_available) == (6, 0)
    assert info.skew_L == (pytest.approx(4 / 3), 1.0)
    assert info.verdict.endswith("it holds loads only")
    json.dumps(info.to_dict())
