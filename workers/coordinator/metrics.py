"""What a group reports to Prometheus, through Ray's metrics; nothing where there is no Ray.

Names begin with `loadmaster_`; Ray puts `ray_` before them. Knows step results. Knows nothing of
how they came about.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np

from ..protocol.step_messages import StepResult


class Metrics(Protocol):
    """Receives what happens in a group."""

    def step(self, results: list[StepResult], wall_us: float, epoch: int) -> None: ...

    def switched(self, epoch: int) -> None: ...

    def recovered(self, seconds: float) -> None: ...


class _NoMetrics:
    def step(self, results: list[StepResult], wall_us: float, epoch: int) -> None:
        return

    def switched(self, epoch: int) -> None:
        return

    def recovered(self, seconds: float) -> None:
        return


NO_METRICS: Metrics = _NoMetrics()


class RayMetrics:
    """Gauges and counters of one group, labelled with its name."""

    def __init__(self, group: str) -> None:
        metrics: Any = importlib.import_module("ray.util.metrics")
        self._tags = {"group": group}

        def make(kind: Any, name: str, what: str, **options: Any) -> Any:
            return kind(f"loadmaster_{name}", what, tag_keys=("group",), **options)

        bounds = [1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000]
        self._step_ms = make(metrics.Histogram, "step_ms", "Wall time of a step", boundaries=bounds)
        self._imbalance = make(
            metrics.Gauge, "imbalance", "Tokens of the busiest rank over the mean, mean over layers"
        )
        self._rows = make(metrics.Counter, "tokens_total", "Rows served")
        self._copies = make(metrics.Counter, "remote_copies_total", "Rows sent to other ranks")
        self._dropped = make(metrics.Counter, "dropped_total", "Assignments over capacity")
        self._epoch = make(metrics.Gauge, "epoch", "Number of the active plan")
        self._switches = make(metrics.Counter, "switches_total", "Plan switches committed")
        self._recoveries = make(metrics.Counter, "recoveries_total", "Failures recovered from")
        self._recovery_s = make(metrics.Gauge, "recovery_seconds", "How long the last one took")

    def step(self, results: list[StepResult], wall_us: float, epoch: int) -> None:
        """A step is over."""
        self._step_ms.observe(wall_us / 1e3, self._tags)
        self._epoch.set(epoch, self._tags)
        tokens_GL = np.array([r.tokens_L for r in results], np.float64)
        busy_L = tokens_GL.sum(axis=0) > 0
        if busy_L.any():
            ratio = (tokens_GL.max(axis=0) / np.maximum(tokens_GL.mean(axis=0), 1e-9))[busy_L]
            self._imbalance.set(float(ratio.mean()), self._tags)
        for counter, total in (
            (self._rows, sum(r.rows for r in results)),
            (self._copies, sum(int(r.remote_transfers_L.sum()) for r in results)),
            (self._dropped, sum(int(r.dropped_L.sum()) for r in results)),
        ):
            if total:
                counter.inc(total, self._tags)

    def switched(self, epoch: int) -> None:
        """Another plan is active."""
        self._switches.inc(1, self._tags)
        self._epoch.set(epoch, self._tags)

    def recovered(self, seconds: float) -> None:
        """The group serves again after a failure."""
        self._recoveries.inc(1, self._tags)
        self._recovery_s.set(seconds, self._tags)
