"""The last steps' figures: as they came, and no more of them than fit."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from loadmaster.workers.coordinator import step_log
from loadmaster.workers.coordinator.step_log import KEPT_STEPS, StepLog
from loadmaster.workers.protocol.step_messages import StepResult

LAYERS = 3


def result(rank: int, step: int, **changed: object) -> StepResult:
    count_L = np.arange(LAYERS) + 10 * rank + step
    figures: dict[str, object] = {
        "rank": rank, "step": step, "epoch": 2, "rows": 7 + rank, "cpu_us": 9.5 + rank,
        "stage_us": 0.25 * rank, "expert_cpu_us_L": count_L + 0.5, "tokens_L": count_L,
        "remote_transfers_L": count_L + 1, "dropped_L": count_L + 2, "peak_L": count_L + 3,
    }
    return StepResult(**(figures | changed))  # type: ignore[arg-type]


def filled(steps: int, ranks: int = 2) -> StepLog:
    log = StepLog(LAYERS)
    for step in range(1, steps + 1):
        log.add([result(r, step) for r in range(ranks)], 100.0 * step, staging=step == 2)
    return log


def test_figures_come_back_as_they_came() -> None:
    found = filled(3).after(1)
    assert found.step.tolist() == [2, 3] and found.epoch.tolist() == [2, 2]
    assert found.rows.tolist() == [[7, 8]] * 2
    assert found.step_cpu_us.tolist() == [[9.5, 10.5]] * 2
    assert found.stage_us.tolist() == [[0.0, 0.25]] * 2
    assert found.expert_cpu_us[0].tolist() == [[2.5, 12.5], [3.5, 13.5], [4.5, 14.5]]
    assert found.tokens[1].tolist() == [[3, 13], [4, 14], [5, 15]]
    assert found.remote_transfers[0, 0].tolist() == [3, 13]
    assert found.dropped[0, 0].tolist() == [4, 14]
    assert found.peak.tolist() == [[15, 16, 17], [16, 17, 18]], "the most of any rank"
    assert found.step_wall_us.tolist() == [200.0, 300.0]
    assert found.staging.tolist() == [True, False]
    assert found.critical_us.tolist() == [12.5 + 13.5 + 14.5, 13.5 + 14.5 + 15.5]


def test_nothing_served_is_no_steps() -> None:
    found = StepLog(LAYERS).after(0)
    assert len(found.step) == 0 and found.critical_us.shape == (0,)


def test_after_a_change_of_ranks_only_the_last_stretch_is_told() -> None:
    log = filled(3)
    log.add([result(r, 4) for r in range(3)], 1.0, staging=False)
    assert log.after(0).step.tolist() == [4]


def test_only_the_last_steps_are_kept() -> None:
    kept = filled(KEPT_STEPS + 5).after(0).step
    assert len(kept) == KEPT_STEPS and kept[-1] == KEPT_STEPS + 5


def test_large_groups_keep_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "_KEPT_BYTES", 300 * 5 * LAYERS * 2 * 8)
    assert len(filled(400).after(0).step) == 300


def test_a_step_kept_takes_little_beside_its_figures() -> None:
    """What came over the network (answers, headers of arrays) is let go."""
    log = filled(1)
    step = log._steps[0]
    figures = (3 + 5 * LAYERS) * 2 * 8
    held = sum(sys.getsizeof(x) for x in (step, step.per_rank, step.per_layer))
    assert step.per_rank.base is None and step.per_layer.base is None
    assert held < figures + 600
