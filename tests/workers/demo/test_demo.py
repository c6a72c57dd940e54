"""The demo's loop, in small: what it promises holds on live ranks."""

import json
from pathlib import Path

import numpy as np
import pytest

from loadmaster.errors import UsageError
from loadmaster.placement.plan import Plan
from loadmaster.traces.load import load_trace
from loadmaster.workers.demo import traffic
from loadmaster.workers.demo.measure import recording_overhead
from loadmaster.workers.demo.result import DemoSize
from loadmaster.workers.demo.run import run_demo


def test_traffic_repeats_and_its_last_third_is_of_other_domains() -> None:
    sent = traffic.mixed_then_shifting(90 * traffic.PROMPT_TOKENS, seed=3)
    assert sent == traffic.mixed_then_shifting(90 * traffic.PROMPT_TOKENS, seed=3)
    third = len(sent.domains) // 3
    assert set(sent.domains[-third + 2 :]) == set(traffic.SHIFT[1])
    assert set(sent.domains[: third - 8]) > set(traffic.SHIFT[1])


def test_recording_overhead_is_the_paired_ratio() -> None:
    class Steps:
        def __init__(self, cpu_us: float) -> None:
            self.step_cpu_us, self.rows = np.full((2, 4), cpu_us), np.full((2, 4), 100)

    on, off = [Steps(1.02), Steps(2.04), Steps(3.06)], [Steps(1.0), Steps(2.0), Steps(3.0)]
    found = recording_overhead(on, off)  # type: ignore[arg-type]
    assert found.share == pytest.approx(0.02) and found.upper_95 == pytest.approx(0.02)


def test_a_run_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        run_demo(out=tmp_path)


@pytest.mark.slow
def test_the_loop_runs_and_keeps_its_promises(tmp_path: Path, ray_cluster: object) -> None:
    size = DemoSize(plan_steps=6, judge_steps=8, rounds=2, decode_prompts=8, decode_tokens=4,
                    overhead_pairs=2)
    result = run_demo(ranks=2, out=tmp_path / "run", size=size)
    assert result.outputs_identical
    assert result.measured.imbalance_mean < result.before.imbalance_mean
    assert result.predicted.imbalance_mean == pytest.approx(result.measured.imbalance_mean, 2e-2)
    assert result.predicted.remote_copies_per_token == pytest.approx(
        result.measured.remote_copies_per_token, 2e-2
    )
    moved = Plan.load(tmp_path / "run" / "contiguous.plan.json").moves_to(
        Plan.load(tmp_path / "run" / "auto.plan.json")
    )
    assert list(result.applied.moved) == moved
    assert load_trace(tmp_path / "run" / "trace").num_tokens > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outputs_identical"] is True
