"""What the last steps cost, and how long a step may take before someone should look.

Knows step results. Knows nothing of requests, plans or Ray. Keeps a fixed number of steps, so a
group that runs for long does not grow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..fleet.heartbeat import PATIENCE_S
from ..protocol.step_messages import StepResult

KEPT_STEPS = 4096
_KEPT_BYTES = 64 << 20      # fewer steps are kept of large groups
_JUDGED_STEPS = 256
_FEWEST_STEPS = 8
# What is kept of a step's results, by name.
_PER_RANK = ("rows", "cpu_us", "stage_us")
_PER_LAYER = ("expert_cpu_us_L", "tokens_L", "remote_transfers_L", "dropped_L", "peak_L")


@dataclass(frozen=True)
class Measurements:
    """Figures of the last steps: 4,096 are kept, fewer of large groups.

    W steps, L layers, G ranks.
    expert_cpu_us is CPU time of the thread that ran the experts, or the GPU's time; the critical
    path of a step is expert_cpu_us.max(axis=2).sum(axis=1).
    """

    step: npt.NDArray[np.int64]                  # [W]
    epoch: npt.NDArray[np.int64]                 # [W]
    rows: npt.NDArray[np.int64]                  # [W, G] rows that were not padding
    expert_cpu_us: npt.NDArray[np.float64]       # [W, L, G]
    tokens: npt.NDArray[np.int64]                # [W, L, G] rows computed
    remote_transfers: npt.NDArray[np.int64]         # [W, L, G] rows sent to other ranks
    dropped: npt.NDArray[np.int64]               # [W, L, G] assignments over capacity
    peak: npt.NDArray[np.int64]                  # [W, L] most assignments of one expert
    step_wall_us: npt.NDArray[np.float64]        # [W] seen by the coordinator
    step_cpu_us: npt.NDArray[np.float64]         # [W, G]
    stage_us: npt.NDArray[np.float64]            # [W, G] spent on moving experts
    staging: npt.NDArray[np.bool_]               # [W] a plan switch was under way

    @property
    def critical_us(self) -> npt.NDArray[np.float64]:
        """[W] sum over layers of the slowest rank's expert CPU time."""
        critical: npt.NDArray[np.float64] = self.expert_cpu_us.max(axis=2, initial=0.0).sum(axis=1)
        return critical

    def take(self, steps: npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]) -> Measurements:
        """Only these steps, by position."""
        return Measurements(**{name: column[steps] for name, column in vars(self).items()})

    @classmethod
    def joined(cls, parts: Sequence[Measurements]) -> Measurements:
        """All steps of the parts, one after another."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))


@dataclass(frozen=True, slots=True)
class _Step:
    step: int
    epoch: int
    per_rank: npt.NDArray[np.float64]      # [3, G] _PER_RANK; counts are exact up to 2^53
    per_layer: npt.NDArray[np.float64]     # [5, L, G] _PER_LAYER
    wall_us: float
    staging: bool


class StepLog:
    """The last steps, oldest first."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._steps: deque[_Step] = deque()
        self._recent_us: deque[float] = deque(maxlen=_JUDGED_STEPS)

    def add(self, results: list[StepResult], wall_us: float, *, staging: bool) -> None:
        """A step is over. Figures are copied; outputs are not kept."""
        per_rank = [[getattr(r, name) for r in results] for name in _PER_RANK]
        per_layer = [[getattr(r, name) for r in results] for name in _PER_LAYER]
        layers_last = np.array(per_layer, np.float64)       # [5, G, L]
        kept = _Step(
            results[0].step, results[0].epoch, np.array(per_rank, np.float64),
            np.ascontiguousarray(layers_last.transpose(0, 2, 1)), wall_us, staging,
        )
        most = min(KEPT_STEPS, max(_JUDGED_STEPS, _KEPT_BYTES // max(1, kept.per_layer.nbytes)))
        while len(self._steps) >= most:
            self._steps.popleft()
        self._steps.append(kept)
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
        kept = [s for s in list(self._steps) if s.step > step]
        if kept:      # where the number of ranks changed: only the last stretch
            kept = [s for s in kept if s.per_rank.shape == kept[-1].per_rank.shape]
        ranks = kept[0].per_rank.shape[1] if kept else 0
        rank_WNG = np.array([s.per_rank for s in kept]).reshape(
            len(kept), len(_PER_RANK), ranks
        )
        layer_WNLG = np.array([s.per_layer for s in kept]).reshape(
            len(kept), len(_PER_LAYER), self._layers, ranks
        )
        by_rank = {n: rank_WNG[:, i] for i, n in enumerate(_PER_RANK)}
        by_layer = {n: layer_WNLG[:, i] for i, n in enumerate(_PER_LAYER)}
        return Measurements(
            step=np.array([s.step for s in kept], np.int64),
            epoch=np.array([s.epoch for s in kept], np.int64),
            rows=by_rank["rows"].astype(np.int64),
            expert_cpu_us=by_layer["expert_cpu_us_L"],
            tokens=by_layer["tokens_L"].astype(np.int64),
            remote_transfers=by_layer["remote_transfers_L"].astype(np.int64),
            dropped=by_layer["dropped_L"].astype(np.int64),
            peak=by_layer["peak_L"].max(axis=2, initial=0.0).astype(np.int64),
            step_wall_us=np.array([s.wall_us for s in kept], np.float64),
            step_cpu_us=by_rank["cpu_us"],
            stage_us=by_rank["stage_us"],
            staging=np.array([s.staging for s in kept], np.bool_),
        )
