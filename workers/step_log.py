"""What the last steps cost, and how long a step may take before someone should look.

Knows step results. Knows nothing of requests, plans or Ray. Keeps a fixed number of steps, so a
group that runs for long does not grow.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .heartbeat import PATIENCE_S
from .work import StepResult

KEPT_STEPS = 4096
_JUDGED_STEPS = 256
_FEWEST_STEPS = 8


@dataclass(frozen=True)
class Measurements:
    """Figures of the last steps (at most 4,096 are kept). W steps, L layers, G ranks.

    expert_cpu_us is CPU time of the thread that ran the experts; the critical path of a step is
    expert_cpu_us.max(axis=2).sum(axis=1).
    """

    step: npt.NDArray[np.int64]                  # [W]
    epoch: npt.NDArray[np.int64]                 # [W]
    rows: npt.NDArray[np.int64]                  # [W, G] rows that were not padding
    expert_cpu_us: npt.NDArray[np.float64]       # [W, L, G]
    tokens: npt.NDArray[np.int64]                # [W, L, G] rows computed
    remote_copies: npt.NDArray[np.int64]         # [W, L, G] rows sent to other ranks
    dropped: npt.NDArray[np.int64]               # [W, L, G] assignments over capacity
    peak: npt.NDArray[np.int64]                  # [W, L] most assignments of one expert
    step_wall_us: npt.NDArray[np.float64]        # [W] seen by the coordinator
    step_cpu_us: npt.NDArray[np.float64]         # [W, G]
    stage_us: npt.NDArray[np.float64]            # [W, G] spent on moving experts
    staging: npt.NDArray[np.bool_]               # [W] a plan switch was under way

    @property
    def critical_us(self) -> npt.NDArray[np.float64]:
        """[W] sum over layers of the slowest rank's expert CPU time."""
        critical: npt.NDArray[np.float64] = self.expert_cpu_us.max(axis=2).sum(axis=1)
        return critical

    def take(self, steps: npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]) -> Measurements:
        """Only these steps, by position."""
        return Measurements(**{name: column[steps] for name, column in vars(self).items()})

    @classmethod
    def joined(cls, parts: Sequence[Measurements]) -> Measurements:
        """All steps of the parts, one after another."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))


@dataclass(frozen=True)
class _Step:
    results: tuple[StepResult, ...]
    wall_us: float
    staging: bool


class StepLog:
    """The last steps, oldest first."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._steps: deque[_Step] = deque(maxlen=KEPT_STEPS)
        self._recent_us: deque[float] = deque(maxlen=_JUDGED_STEPS)

    def add(self, results: list[StepResult], wall_us: float, *, staging: bool) -> None:
        """A step is over. Outputs are not kept."""
        bare = tuple(
            dataclasses.replace(r, next_token={}, digest={}, logits={}, own_ids={})
            for r in results
        )
        self._steps.append(_Step(bare, wall_us, staging))
        self._recent_us.append(wall_us)

    def forget_pace(self) -> None:
        """The ranks are not what they were: judge the time of a step anew."""
        self._recent_us.clear()

    @property
    def knows_pace(self) -> bool:
        """Whether enough steps have been seen to say how long one takes."""
        return len(self._recent_us) >= _FEWEST_STEPS

    def overdue_s(self, longest_s: float) -> float:
        """After how long a step is suspicious: 5 x the p99 of recent ones and at least 1 s.

        Until a few steps have been seen, PATIENCE_S: asking a busy rank costs nothing.
        """
        if not self.knows_pace:
            return min(longest_s, PATIENCE_S)
        return min(longest_s, max(1.0, 5e-6 * float(np.quantile(self._recent_us, 0.99))))

    def after(self, step: int) -> Measurements:
        """Figures of the steps after this one (they count from 1), as far as they are kept."""
        kept = [s for s in list(self._steps) if s.results[0].step > step]
        if kept and len({len(s.results) for s in kept}) > 1:
            ranks = len(kept[-1].results)       # the number of ranks changed: only the last stretch
            kept = [s for s in kept if len(s.results) == ranks]
        ranks = len(kept[0].results) if kept else 0

        def per_rank(name: str, dtype: Any) -> Any:
            rows = [[getattr(r, name) for r in s.results] for s in kept]
            return np.array(rows, dtype).reshape(len(rows), ranks)

        def per_layer(name: str, dtype: Any) -> Any:
            rows = [[getattr(r, name) for r in s.results] for s in kept]
            return np.array(rows, dtype).reshape(len(rows), ranks, self._layers).transpose(0, 2, 1)

        return Measurements(
            step=np.array([s.results[0].step for s in kept], np.int64),
            epoch=np.array([s.results[0].epoch for s in kept], np.int64),
            rows=per_rank("rows", np.int64),
            expert_cpu_us=per_layer("expert_cpu_us_L", np.float64),
            tokens=per_layer("tokens_L", np.int64),
            remote_copies=per_layer("remote_copies_L", np.int64),
            dropped=per_layer("dropped_L", np.int64),
            peak=per_layer("peak_L", np.int64).max(axis=2, initial=0),
            step_wall_us=np.array([s.wall_us for s in kept], np.float64),
            step_cpu_us=per_rank("cpu_us", np.float64),
            stage_us=per_rank("stage_us", np.float64),
            staging=np.array([s.staging for s in kept], np.bool_),
        )
